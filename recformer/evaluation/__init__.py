"""How a model is judged: ranks, figures, intervals, comparisons."""
