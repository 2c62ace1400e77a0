"""An approximate index of a catalogue, with how much of the true answer it finds.

`recformer index --model result/best_model`

Writes index/ into the folder of the model. Exact search compares every item; at some hundred
thousand items a request takes tens of milliseconds, and an index answers in a fraction of that.
What it misses is measured: recall is the share of the true best that it finds, and the least depth
that reaches --recall is kept. `recformer recommend --approximate` searches through it, filters and
products added later included. When the catalogue's vectors change it is refused and has to be built
anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from recformer.cli import command_parser, keep_freed_memory
from recformer.files import UserError
from recformer.recommendation import CatalogueRecommender
from recformer.recommendation.approximate import (
    DEPTHS,
    ApproximateIndex,
    Manifest,
    require_faiss,
)
from recformer.recommendation.histories import read_histories


def table(manifest: Manifest) -> str:
    """Measurements, one line for each depth."""
    name = "clusters looked at" if manifest.kind == "ivf" else "nodes looked at"
    lines = [f"{name:<20}{f'recall@{manifest.k}':>10}{'ms a query':>12}"]
    for each in manifest.measured:
        lines.append(f"{each.depth:<20}{each.recall:>10.4f}{1e3 * each.seconds:>12.3f}")
    lines.append(f"{'exact':<20}{1:>10.4f}{1e3 * manifest.exact_seconds:>12.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, build, measure, write."""
    parser = command_parser("index", __doc__)
    parser.add_argument(
        "--model", required=True, type=Path, metavar="FOLDER", help="of recformer finetune"
    )
    parser.add_argument(
        "--kind",
        choices=sorted(DEPTHS),
        default="ivf",
        help="ivf: clusters, quick to build; hnsw: a graph, quicker to search (default: "
        "%(default)s)",
    )
    parser.add_argument("--k", type=int, default=10, help="of the recall (default: %(default)s)")
    parser.add_argument(
        "--recall", type=float, default=0.95, help="to be reached (default: %(default)s)"
    )
    parser.add_argument(
        "--histories",
        type=Path,
        metavar="FILE",
        help="users to measure recall with (default: items drawn from the catalogue, as if each "
        "were a history)",
    )
    parser.add_argument(
        "--queries", type=int, default=1000, help="to measure with (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    if args.k < 1 or args.queries < 1:
        raise UserError(f"--k {args.k}, --queries {args.queries}: must be at least 1")
    if not 0 < args.recall <= 1:
        raise UserError(f"--recall {args.recall}: must be above 0 and at most 1")
    if args.histories is not None and not args.histories.exists():
        raise FileNotFoundError(f"{args.histories} does not exist")
    require_faiss()
    recommender = CatalogueRecommender.load(args.model)
    view = recommender.catalogue.view
    if args.histories is None:
        drawn = np.random.default_rng(0).permutation(len(view))[: args.queries]
        queries = view.at(np.sort(drawn))
    else:
        some = islice(read_histories(args.histories), args.queries)
        queries = recommender.user_vectors([items for _, items in some])
        if not len(queries):
            raise UserError(f"{args.histories}: no history has an item that the catalogue holds")
    index = ApproximateIndex.build(view, queries, args.kind, args.k, args.recall)
    index.save(args.model)
    manifest = index.manifest
    print(table(manifest))
    if manifest.recall < args.recall:
        print(f"warning: no depth that was tried reaches a recall of {args.recall}")
    print(
        f"{args.model / 'index'}: {manifest.rows:,} items, {manifest.kind} at a depth of "
        f"{manifest.depth}, recall@{manifest.k} {manifest.recall:.4f} over {manifest.queries:,} "
        "queries"
    )
