"""Semantic ids: every item gets a short tuple of codes that comes from its text.

`recformer semantic-ids --data_path FOLDER --text_encoder ENCODER --output_dir DIR`

Writes semantic_ids.json (the ids), quantiser.safetensors (which gives new items their ids,
`--extend DIR`), report.json, and hierarchy.md, .tex, .csv and .png (size and typical words of every
first-level code).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baselines.semantic_ids import words as code_words
from baselines.semantic_ids.ids import FILE, TEXT_ENCODER, SemanticIds
from baselines.semantic_ids.quantisers import (
    QUANTISER_FILE,
    code_statistics,
    load_quantiser,
    reconstruction_error,
    save_quantiser,
)
from baselines.semantic_ids.rkmeans import ResidualKMeans
from baselines.semantic_ids.rqvae import RQVAE
from baselines.semantic_ids.settings import QuantiserSettings, optional_flags
from baselines.semantic_ids.unique import check_room, content_codes, extended_ids, unique_ids
from baselines.text_vectors import text_vectors
from recformer.cli import exit_with_message, keep_freed_memory, parse_flags
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.table import csv_table
from recformer.files import UserError, atomic_write, write_json
from recformer.training.arguments import flag


@dataclass
class SemanticIdRunArguments:
    """Give every item of a processed folder a short tuple of codes that comes from its text."""

    data_path: str = flag(
        "finetune_data/Scientific", "processed folder, as `recformer process` writes it"
    )
    output_dir: str = flag("semantic_ids", "folder for the ids, the quantiser and the report")
    text_encoder: str | None = flag(
        None,
        "folder or hub id of a sentence encoder, or of a Recformer; unset: "
        f"{TEXT_ENCODER}, with --extend the one that its ids were made with",
    )
    extend: str | None = flag(
        None,
        "folder that this command wrote before: its quantiser gives ids to the items that have "
        "none there, all others keep theirs",
    )

    def given(self) -> dict[str, Any]:
        """The settings of a quantiser that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(QuantiserSettings)}
        return {name: value for name, value in values.items() if value is not None}


#: `SemanticIdRunArguments` with a flag for every setting of a quantiser, None where not given.
SemanticIdArguments: type[SemanticIdRunArguments] = make_dataclass(
    "SemanticIdArguments",
    optional_flags(),
    bases=(SemanticIdRunArguments,),
    namespace={"__doc__": SemanticIdRunArguments.__doc__, "__module__": __name__},
)


def run(args: SemanticIdRunArguments) -> SemanticIds:
    """Make or extend ids, print what they are like, and write them.

    Raises:
        FileNotFoundError, UserError: as `ProcessedFolder.load`, `text_vectors`, `SemanticIds.load`,
            `extended_ids`; or flags that make no sense, alone or together.
    """
    chosen = _checked(args.extend, args.given())
    text_encoder = args.text_encoder or TEXT_ENCODER
    if args.extend is not None:
        before = SemanticIds.load(Path(args.extend) / FILE)
        quantiser, trained_with = load_quantiser(Path(args.extend) / QUANTISER_FILE)
        text_encoder = args.text_encoder or trained_with
    folder = ProcessedFolder.load(args.data_path)
    if args.extend is None and chosen.collisions == "reassign":
        check_room(folder.num_items, chosen.levels, chosen.codebook_size)
    elif args.extend is not None and len(before.codebook_size) == before.levels:
        together = set(before.asins).union(folder.asins)
        check_room(len(together), before.levels, before.codebook_size[0])
    started = time.monotonic()
    vectors = np.asarray(text_vectors(folder, text_encoder))
    seconds = {"vectors": time.monotonic() - started}

    started = time.monotonic()
    report: dict[str, Any] = {}
    if args.extend is None:
        torch.manual_seed(chosen.seed)
        sizes = vectors.shape[1], chosen.levels, chosen.codebook_size
        if chosen.method == "rqvae":
            quantiser = RQVAE(*sizes, commitment=chosen.commitment)
        else:
            quantiser = ResidualKMeans(*sizes)
        history = quantiser.fit(vectors, chosen.seed)
        report |= {"seed": chosen.seed, "history": history}
        seconds["fit"] = time.monotonic() - started
        started = time.monotonic()
        ids = unique_ids(quantiser, vectors, folder.asins, chosen.collisions)
    else:
        if vectors.shape[1] != quantiser.settings["vector_size"]:
            raise UserError(
                f"{text_encoder} gives vectors of {vectors.shape[1]} values, the quantiser in "
                f"{args.extend} takes {quantiser.settings['vector_size']}: name its --text_encoder"
            )
        ids = extended_ids(before, quantiser, vectors, folder.asins)
        report["new_items"] = len(ids.asins) - len(before.asins)
    seconds["ids"] = time.monotonic() - started

    _, codes = content_codes(quantiser, vectors)
    distinct = len(np.unique(vectors, axis=0))
    report = {
        "method": ids.method,
        "settings": quantiser.settings,
        "text_encoder": text_encoder,
        "items": folder.num_items,
        "different_vectors": distinct,
        "reconstruction_error": reconstruction_error(quantiser, vectors, codes),
        **code_statistics(codes, quantiser.settings["codebook_size"]),
        "ids": {"codebook_size": ids.codebook_size, "vectors": ids.vectors, "hash": ids.hash},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        **report,
    }
    _print(report)

    output_dir = Path(args.output_dir)
    rows = code_words.describe(codes, folder.items)
    for ending, content in (
        ("md", code_words.markdown(rows)),
        ("tex", code_words.latex(rows)),
        ("csv", csv_table(code_words.records(rows))),
    ):
        with atomic_write(output_dir / f"hierarchy.{ending}") as handle:
            handle.write(content)
    code_words.plot(rows, output_dir / "hierarchy.png")
    write_json(output_dir / "report.json", report, indent=1)
    save_quantiser(output_dir / QUANTISER_FILE, quantiser, text_encoder)
    ids.save(output_dir / FILE)  # last: names what is complete
    print(f"written to {output_dir}: {FILE}, {QUANTISER_FILE}, report.json, hierarchy.md, .tex, "
          ".csv and .png")  # fmt: skip
    return ids


def _checked(extend: str | None, given: dict[str, Any]) -> QuantiserSettings:
    """The settings, refused before any work where flags make no sense, alone or together.

    Raises:
        UserError: says which.
    """
    if extend is not None and given:
        raise UserError(f"--{next(iter(given))} is that of {extend}: leave it out with --extend")
    if given.get("method") == "rkmeans" and "commitment" in given:
        raise UserError("--commitment is no flag of --method rkmeans")
    return QuantiserSettings(**given)


def _print(report: dict[str, Any]) -> None:
    """The report as a person reads it."""
    print(
        f"{report['method']}: {report['items']:,} items, {report['different_vectors']:,} different "
        f"vectors; {report['colliding_items']:,} items share their content codes with another, at "
        f"most {report['largest_collision']:,} the same"
    )
    print("  level  variance lost  usage   entropy (bits)")
    columns = zip(report["reconstruction_error"], report["usage"], report["entropy"], strict=True)
    for level, (lost, usage, entropy) in enumerate(columns, 1):
        print(f"  {level:<7}{lost:<15.4f}{usage:<8.1%}{entropy:.2f}")
    if "new_items" in report:
        print(f"  {report['new_items']:,} new items; no other item has moved")
    print(f"  unique ids of {report['ids']['codebook_size']} codes, {report['ids']['hash'][:12]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    args = parse_flags("semantic-ids", __doc__, SemanticIdArguments, argv)
    keep_freed_memory()
    run(args)


if __name__ == "__main__":
    exit_with_message(main)
