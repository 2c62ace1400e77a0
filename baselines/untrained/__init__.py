"""Untrained baselines that every model must beat."""
