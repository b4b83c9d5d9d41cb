"""FedBERT-DS: federated split pre-training of BERT with a DeepSpeed body."""

__version__ = "0.1.0"
