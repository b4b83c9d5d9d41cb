"""A GLUE task fine-tuned in one place, split, and by a federation."""
