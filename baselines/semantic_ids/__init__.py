"""Codes of items from their texts, and the command that makes them."""
