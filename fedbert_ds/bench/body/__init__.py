"""`fedbert-ds bench body`: training steps of BERT encoders, packed beside padded."""
