"""Evaluation: ranks, figures, intervals, comparisons."""
