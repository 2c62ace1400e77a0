"""How a model is trained: trainer, stages, histories, the item table."""
