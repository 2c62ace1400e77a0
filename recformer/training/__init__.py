"""Training: trainer, stages, histories, the item table."""
