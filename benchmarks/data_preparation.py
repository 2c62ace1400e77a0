"""Reading raw files: typed parsing over isal's gzip against `json.loads` over `gzip`.

Both sides read the same generated files, clean the same text with the same function and end with
the same result, which is compared. Each runs in a process of its own. The generated metadata has
what real metadata has and nobody reads (descriptions, also_buy, image addresses); the lean file has
the same products without these fields.
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import REPEATS, Work, row, run_alone
from recformer.files import sha256_of
from recformer.preparation.amazon import DEFAULT_ATTRIBUTES, read_interactions, read_metadata
from recformer.preparation.splits import Interactions
from recformer.preparation.text import clean_text

ATTRIBUTES = DEFAULT_ATTRIBUTES


def write_files(folder: Path, num_products: int) -> None:
    """Write meta_fat, meta_lean and reviews (.json.gz), from a fixed seed."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdlmnprst", k=draw.randint(3, 9))) for _ in range(4000)]

    def text(num_words: int) -> str:
        return " ".join(draw.choices(words, k=num_words))

    # A third of the titles and categories of the real files carry an entity.
    def joint() -> str:
        return draw.choice((" ", " ", " &amp; "))

    asins = [f"B{number:09d}" for number in range(num_products)]
    paths = [["Industrial &amp; Scientific", text(2), text(2) + joint() + text(1)] for _ in asins]
    paths = paths[: max(1, num_products // 6)]  # products a category, as in the real files
    images = "https://images-na.ssl-images-amazon.com/images/I/"
    with (
        gzip.open(folder / "meta_fat.json.gz", "wt", compresslevel=6) as fat,
        gzip.open(folder / "meta_lean.json.gz", "wt", compresslevel=6) as lean,
        gzip.open(folder / "reviews.json.gz", "wt", compresslevel=6) as reviews,
    ):
        for asin in asins:
            kept = {
                "category": draw.choice(paths),
                "title": text(6) + joint() + text(5),
                "brand": text(1),
            }
            ignored = {
                "description": [text(90)],
                "feature": [text(14) for _ in range(4)],
                "also_buy": draw.choices(asins, k=60),
                "also_view": draw.choices(asins, k=30),
                "imageURLHighRes": [f"{images}{text(1)}.jpg" for _ in range(6)],
                "details": {"Shipping Weight:": "3 ounces", "ASIN: ": asin},
                "price": "$9.99",
            }
            fat.write(json.dumps({**ignored, **kept, "asin": asin}) + "\n")
            lean.write(json.dumps({**kept, "asin": asin}) + "\n")
            for _ in range(4):
                review = {
                    "overall": 5.0,
                    "verified": True,
                    "reviewTime": "06 17, 2018",
                    "reviewerID": f"A{draw.randrange(num_products):013d}",
                    "asin": draw.choice(asins),
                    "reviewerName": text(2),
                    "reviewText": text(40),
                    "summary": text(4),
                    "unixReviewTime": draw.randrange(1_400_000_000, 1_530_000_000),
                }
                reviews.write(json.dumps(review) + "\n")


def plain_metadata(path: Path) -> dict[str, dict[str, str]]:
    """The peer: every line a dict of everything, then the same text and the same cleaning."""
    products = {}
    with gzip.open(path) as lines:
        for line in lines:
            row = json.loads(line)
            item = {}
            for name in ATTRIBUTES:
                value = row.get(name)
                if value is not None:
                    value = clean_text("\n".join(value) if isinstance(value, list) else value)
                    if value:
                        item[name] = value
            if item:
                products[row["asin"]] = item
    return products


def plain_reviews(path: Path) -> list[tuple[str, str, int]]:
    """The peer: every line a dict of everything, then user, item and time."""
    events = []
    with gzip.open(path) as lines:
        for line in lines:
            row = json.loads(line)
            events.append((row["reviewerID"], row["asin"], row["unixReviewTime"]))
    return events


class _Anything:
    """Every asin is known."""

    def __contains__(self, asin: object) -> bool:
        return True


def our_reviews(path: Path) -> Interactions:
    """Ours: user, item and time as arrays."""
    return read_interactions(path, _Anything())[0]


def our_metadata(path: Path) -> dict[str, dict[str, str]]:
    """Ours: the text of every product."""
    return read_metadata([path], ATTRIBUTES)[0]


def events_of(interactions: Interactions) -> list[tuple[str, str, int]]:
    """User, item and time by name."""
    users, items = interactions.user_names, interactions.item_names
    codes = zip(
        interactions.users.tolist(), interactions.items.tolist(), interactions.times.tolist()
    )
    return [(users[user], items[item], when) for user, item, when in codes]


def reading_case(reader: str, path: str) -> Work:
    """One of the four readers over a file; the summary is a hash of what it read."""
    read: Callable[[Path], Any] = {
        "our_metadata": our_metadata,
        "plain_metadata": plain_metadata,
        "our_reviews": our_reviews,
        "plain_reviews": plain_reviews,
    }[reader]

    def summary(result: Any) -> str:
        return sha256_of(json.dumps(events_of(result) if reader == "our_reviews" else result))

    return Work(lambda: read(Path(path)), summary)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Metadata with and without what nobody reads, and reviews.

    Raises:
        AssertionError: the two sides did not come to the same result.
    """
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name), 50 if quick else 20_000)
        for what, kind, file_name in (
            ("metadata, with ignored fields", "metadata", "meta_fat.json.gz"),
            ("metadata, without", "metadata", "meta_lean.json.gz"),
            ("reviews", "reviews", "reviews.json.gz"),
        ):
            path = Path(name) / file_name
            ours, peer = (
                run_alone(reading_case, f"{side}_{kind}", str(path), repeats=REPEATS)
                for side in ("our", "plain")
            )
            assert ours["summary"] == peer["summary"], f"{what}: results differ"
            yield row(
                f"read {what}",
                ours["seconds"],
                "json.loads over gzip",
                peer["seconds"],
                amount=path.stat().st_size / 1e6,
                unit="MB",
                peak_memory_mb=ours["peak_memory_mb"],
                peer_peak_memory_mb=peer["peak_memory_mb"],
            )
