"""Fine-tuning of one checkpoint on GLUE: every task and seed, tables, and files to submit."""
