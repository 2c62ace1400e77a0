"""Recformer: sequential recommendation from language."""
