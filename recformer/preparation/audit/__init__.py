"""Audit of a processed folder: flaws that can spoil an evaluation."""
