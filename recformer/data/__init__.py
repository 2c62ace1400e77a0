"""Data for training: processed items, their tokens, batches."""
