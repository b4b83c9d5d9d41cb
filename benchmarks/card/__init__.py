"""All that a GPU is needed for, in the minutes that one is lent."""
