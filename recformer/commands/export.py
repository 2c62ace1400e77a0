"""A finetuned model for other programs: item vectors in files, the encoder as ONNX.

`recformer export --model result/best_model --forms parquet onnx --output_dir export`

Each form becomes a folder of that name in the output folder, whole or not at all, with a manifest
of what is in it: model, number of items, dimension, content hash, how a user's vector is made.

    parquet   items.parquet: item, vector, attributes
    qdrant    collection.json and points-00000.json, …: bodies of Qdrant's REST requests
    pgvector  items.copy and items.sql, which loads it:  psql -f items.sql
    onnx      encoder.onnx, with --int8 encoder.int8.onnx too, and the tokenizer; run and compared
              with the encoder before anything is kept; needs pip install 'recformer[onnx]'

Vectors have the length 1: an inner product is the cosine that `recformer recommend` ranks by. A
model that was finetuned with --method head scores items of the user's history by more than that;
docs/guides/serving-elsewhere.md has a recipe for each form, and what to do about those items.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from recformer.cli import command_parser, keep_freed_memory
from recformer.export.folders import check_target
from recformer.export.onnx import export_encoder, require_packages
from recformer.export.vectors import FORMS, export_vectors
from recformer.files import UserError
from recformer.processes import say
from recformer.recommendation import CatalogueRecommender

ONNX = "onnx"


def run(args: argparse.Namespace) -> None:
    """Check what was asked for, load, write, say what was written."""
    forms = list(dict.fromkeys(args.forms))
    if args.int8 and ONNX not in forms:
        raise UserError("--int8 is for the form onnx: --forms onnx --int8")
    if ONNX in forms:
        require_packages()
    for form in forms:
        check_target(args.output_dir / form)
    recommender = CatalogueRecommender.load(args.model, args.meta_file)
    stores = [form for form in forms if form != ONNX]
    if stores:
        manifest = export_vectors(recommender, args.output_dir, stores, args.model)
        say(
            f"{manifest['count']:,} items of {manifest['dimension']} numbers each written to "
            + ", ".join(str(args.output_dir / form) for form in stores)
        )
        if "factor" in manifest["user"]:
            say(
                "items of a user's history have a score beyond the inner product: see "
                "docs/guides/serving-elsewhere.md, or leave them out of what is recommended"
            )
    if ONNX in forms:
        items = list(chain.from_iterable(texts for _, _, texts in recommender.rows()))
        manifest = export_encoder(
            recommender.model,
            recommender.tokenizer,
            items,
            args.output_dir / ONNX,
            args.model,
            args.int8,
        )
        say(f"encoder written to {args.output_dir / ONNX}; {_checked(manifest)}")


def _checked(manifest: dict[str, Any]) -> str:
    text = f"greatest difference in onnxruntime {manifest['greatest_difference']:.1e}"
    if "int8_cosines" in manifest:
        text += f"; cosine of the int8 vectors {manifest['int8_cosines']['mean']:.4f} in the mean"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    parser = command_parser("export", __doc__)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="best model of recformer.finetune"
    )
    parser.add_argument(
        "--meta_file",
        metavar="FILE",
        help="meta_data.json of the processed folder, new products among it (default: the one in "
        "the model's folder)",
    )
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=[*FORMS, ONNX],
        default=["parquet"],
        metavar="FORM",
        help=f"of {', '.join([*FORMS, ONNX])} (default: parquet)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("export"),
        metavar="DIR",
        help="a folder for each form is made in it (default: %(default)s)",
    )
    parser.add_argument(
        "--int8", action="store_true", help="with onnx: also with 8-bit weights, smaller and faster"
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    run(args)
