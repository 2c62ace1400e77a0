"""What training reads: processed items, their tokens, batches."""
