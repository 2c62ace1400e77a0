"""Recommend products that nobody has bought: add them by their text, and see who gets them.

python examples/cold_items.py MODEL HISTORIES NEW_PRODUCTS

MODEL is the folder `best_model` of `recformer finetune`, HISTORIES a file of JSON lines
(`{"user": "ann", "items": ["tent-4"]}`), NEW_PRODUCTS a JSON file
(`{"tent-new": {"title": "Tent for two"}}`). Nothing is trained and nothing in MODEL changes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recformer.recommendation import CatalogueRecommender


def main(argv: list[str] | None = None) -> None:
    """Add, recommend, explain."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "histories", "new_products"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args(argv)

    recommender = CatalogueRecommender.load(args.model)
    new = json.loads(args.new_products.read_text(encoding="utf-8"))
    before = len(recommender)
    recommender.add_items(new)
    print(f"{before} products, and {len(recommender) - before} that nobody has bought")

    lines = args.histories.read_text(encoding="utf-8").splitlines()
    users = [json.loads(line) for line in lines if line]
    histories = [user["items"] for user in users]
    # Among all products first; then the new ones alone, which is a page "new for you".
    for user, everything in zip(users, recommender.recommend(histories, k=10), strict=True):
        reached = [name for name in everything.items if name in new]
        print(f"{user['user']}: {len(reached)} new ones among the best 10 {reached}")
    offers = recommender.recommend(histories, k=1, allowed=list(new))
    for user, offer in zip(users, offers, strict=True):
        if offer.fallback is None:
            print(
                f"{user['user']}: {recommender.explain(user['items'], offer.items[0]).sentence()}"
            )
        else:
            print(f"{user['user']}: nothing is known of this history, so {offer.fallback} items")
    for name in new:
        near = recommender.similar_items(name, k=3).items
        print(f"most like {name}: {', '.join(near)}")


if __name__ == "__main__":
    main()
