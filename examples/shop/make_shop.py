"""Write the files that a shop has: products.csv, events.csv, and histories of three visitors.

    python examples/shop/make_shop.py --output_dir shop

A made-up bicycle shop of some 300 products; the law of its purchases is that of
`recformer/preparation/sample.py`. events.csv has what a web shop logs: who, in which session, when
(ISO 8601, UTC), what kind of event (view, cart, purchase) on which product. The same seed gives the
same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from random import Random

from recformer.cli import exit_with_message
from recformer.files import atomic_write
from recformer.preparation.sample import TARGET_CATEGORY, Shop

VISITORS = 500
PRODUCT_COLUMNS = ("item_id", "title", "brand", "category", "price")
EVENT_COLUMNS = ("user_id", "session_id", "timestamp", "event", "item_id")


def products(shop: Shop) -> list[list[str]]:
    """Rows of PRODUCT_COLUMNS; products that nobody bought too."""
    rows = []
    for row in shop.rows + shop.unsold:
        category = " > ".join(row.get("category") or [])
        price = (row.get("price") or "").removeprefix("$")
        title, brand = row.get("title") or "", row.get("brand") or ""
        if title:  # a product without a name is nothing to show
            rows.append([row["asin"], " ".join(title.split()), brand, category, price])
    return rows


def events(shop: Shop, draw: Random) -> list[list[str]]:
    """Rows of EVENT_COLUMNS, by time."""
    rows = []
    for number, reviewer in enumerate(shop.reviewers[:VISITORS], 1):
        pairs = zip(reviewer.purchases, reviewer.days, strict=True)
        for visit, (bought, day) in enumerate(pairs, 1):
            time = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(
                days=day, seconds=draw.randrange(8 * 3600, 22 * 3600)
            )
            neighbours = [draw.randrange(len(shop.rows)) for _ in range(draw.randrange(3))]
            steps = [*(("view", item) for item in neighbours), ("view", bought)]
            steps += [("cart", bought), ("purchase", bought)]
            for kind, item in steps:
                time += timedelta(seconds=draw.randrange(5, 300))
                stamp = time.isoformat().replace("+00:00", "Z")
                session = f"s{number:04}-{visit}"
                rows.append([f"u{number:04}", session, stamp, kind, shop.rows[item]["asin"]])
    return sorted(rows, key=lambda row: (row[2], row[0]))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic_write(path) as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main() -> None:
    """Write the files and say what is in them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("shop"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shop = Shop(TARGET_CATEGORY, args.seed)
    items = products(shop)
    log = events(shop, Random(f"events {args.seed}"))
    write_csv(args.output_dir / "products.csv", PRODUCT_COLUMNS, items)
    write_csv(args.output_dir / "events.csv", EVENT_COLUMNS, log)
    bought = [row[4] for row in log if row[0] == "u0001" and row[3] == "purchase"]
    visitors = [
        {"user": "u0001", "items": bought},
        {"user": "of an item no shop knows", "items": [{"title": "Blinking rear light, red"}]},
        {"user": "new", "items": []},
    ]
    with atomic_write(args.output_dir / "histories.jsonl") as handle:
        handle.writelines(json.dumps(visitor) + "\n" for visitor in visitors)
    print(f"{len(items):,} products and {len(log):,} events written to {args.output_dir}")


if __name__ == "__main__":
    exit_with_message(main)
