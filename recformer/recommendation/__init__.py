"""A finetuned folder as something that recommends: histories in, items out.

>>> recommender = CatalogueRecommender.load("result/best_model")
>>> (best,) = recommender.recommend([["tent-4", "tent-5"]], k=10)
>>> len(best.items), len(best.scores)
(10, 10)
>>> recommender.add_items({"tent-new": {"title": "Tent for two", "brand": "Acme"}})
1

Both methods of finetuning leave such a folder: `published`, whose model reads a history as one
sequence, and `head`, which reads items one by one.

The catalogue is every product of `meta_data.json`. Those that the model was finetuned on have the
vectors of its item table, which the evaluation ranks; the others, and what is added or changed
later, are encoded by the model, once a text.

Shapes: B users, N items, H hidden, k items recommended.
"""

from __future__ import annotations

from recformer.recommendation.answers import Explanation, HistoryItem, Recommended
from recformer.recommendation.recommender import VECTORS_FOLDER, CatalogueRecommender

__all__ = ["VECTORS_FOLDER", "CatalogueRecommender", "Explanation", "HistoryItem", "Recommended"]
