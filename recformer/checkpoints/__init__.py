"""Weights: reading, loading, converting, naming, describing."""
