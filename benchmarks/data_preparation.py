"""Reading raw files: typed parsing over isal's gzip against `json.loads` over `gzip`.

    python -m benchmarks.data_preparation [--products 20000] [--repeats 3]

Both sides read the same generated files, clean the same text with the same function and end with
the same result, which is compared. Each runs in a process of its own; time is the median of the
repeats after a first pass, memory the first pass's peak above what the process held before (Linux).
The generated metadata has what real metadata has and nobody reads (descriptions, also_buy, image
addresses); the lean file has the same products without these fields.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recformer.data.amazon import DEFAULT_ATTRIBUTES, read_interactions, read_metadata
from recformer.data.splits import Interactions
from recformer.data.text import clean_text
from recformer.files import sha256_of

ATTRIBUTES = DEFAULT_ATTRIBUTES
LEAST_RATIO = 2.0  # what the project promises


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


JOBS: dict[str, Callable[[Path], Any]] = {
    "our_metadata": our_metadata,
    "plain_metadata": plain_metadata,
    "our_reviews": our_reviews,
    "plain_reviews": plain_reviews,
}


def _memory_mib(field: str) -> float:
    """VmRSS (held now) or VmHWM (peak since the last reset) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def run_job(name: str, path: Path, repeats: int) -> dict[str, Any]:
    """Time one job in this process and measure its memory (Linux)."""
    job = JOBS[name]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory_mib("VmRSS")
    result = job(path)
    peak = _memory_mib("VmHWM") - before
    content = sha256_of(json.dumps(events_of(result) if name == "our_reviews" else result))
    del result  # so that no two results are held at once
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        job(path)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_mib": peak, "content": content}


def measure(num_products: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table: what, both times, ratio, both peaks.

    Raises:
        AssertionError: the two sides did not come to the same result.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, num_products)
        for what, kind, file_name in (
            ("metadata, with ignored fields", "metadata", "meta_fat.json.gz"),
            ("metadata, without", "metadata", "meta_lean.json.gz"),
            ("reviews", "reviews", "reviews.json.gz"),
        ):
            path = folder / file_name
            ours, peer = (
                _in_own_process(f"{side}_{kind}", path, repeats) for side in ("our", "plain")
            )
            assert ours["content"] == peer["content"], f"{what}: results differ"
            rows.append(
                {
                    "what": what,
                    "file_mib": path.stat().st_size / 2**20,
                    "seconds": ours["seconds"],
                    "json_gzip_seconds": peer["seconds"],
                    "ratio": peer["seconds"] / ours["seconds"],
                    "peak_mib": ours["peak_mib"],
                    "json_gzip_peak_mib": peer["peak_mib"],
                }
            )
    return rows


def _in_own_process(job: str, path: Path, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--job", job, str(path)]
    command += ["--repeats", str(repeats)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--products", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--job", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(run_job(args.job[0], Path(args.job[1]), args.repeats)))
        return

    rows = measure(args.products, args.repeats)
    print(
        f"{'':32}{'file':>9}{'ours':>9}{'json+gzip':>11}{'ratio':>8}"
        f"{'our peak':>12}{'json+gzip peak':>16}"
    )
    for row in rows:
        print(
            f"{row['what']:32}{row['file_mib']:6.1f} MB{row['seconds']:7.2f} s"
            f"{row['json_gzip_seconds']:9.2f} s{row['ratio']:7.1f}x"
            f"{row['peak_mib']:8.0f} MiB{row['json_gzip_peak_mib']:12.0f} MiB"
        )
    reached = "reached" if rows[0]["ratio"] >= LEAST_RATIO else "MISSED"
    print(
        f"mark: at least {LEAST_RATIO:.1f}x with ignored fields, cleaning on both sides: {reached}"
    )


if __name__ == "__main__":
    main()
