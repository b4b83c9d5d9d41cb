"""Fine-tuning on GLUE beside plain transformers code."""
