"""Semantic ids: codes of items from their texts, and where a new product would stand.

python examples/semantic_ids.py FOLDER [--encoder MODEL] [--codebook_size 8] [--levels 3]

`recformer semantic-ids` has the same as a command, for `recformer baseline --model tiger`.
"""

from __future__ import annotations

import argparse

import numpy as np

from baselines.semantic_ids.quantisers import reconstruction_error
from baselines.semantic_ids.rkmeans import ResidualKMeans
from baselines.semantic_ids.unique import content_codes, extended_ids, unique_ids
from baselines.semantic_ids.words import describe
from baselines.text_vectors import text_vectors
from recformer.data.processed import ProcessedFolder


def main(argv: list[str] | None = None) -> None:
    """Quantise the catalogue's text vectors level by level and say what the codes mean."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--codebook_size", type=int, default=8)
    parser.add_argument("--levels", type=int, default=3)
    args = parser.parse_args(argv)

    folder = ProcessedFolder.load(args.folder)
    vectors = np.asarray(text_vectors(folder, args.encoder))  # (N, H)
    quantiser = ResidualKMeans(vectors.shape[1], args.levels, args.codebook_size)
    quantiser.fit(vectors, seed=0)
    _, codes = content_codes(quantiser, vectors)  # (N, levels), not unique
    lost = reconstruction_error(quantiser, vectors, codes)
    print("variance lost after each level:", *(f"{share:.2f}" for share in lost))
    for row in describe(codes, folder.items):
        words = ", ".join(f"{word} ({share:.0%})" for word, share in row.title)
        print(f"code {row.code}: {row.size} items, {row.children} second codes: {words}")

    ids = unique_ids(quantiser, vectors, folder.asins)  # a last level tells equal codes apart
    name, title = folder.asins[0], folder.items[0].get("title", "")
    print(f"{name} ({title}) has the id {ids.codes[0].tolist()}")
    # A new product moves no other. Here it is a copy, so only the last level differs.
    grown = extended_ids(
        ids, quantiser, np.concatenate([vectors, vectors[:1]]), [*folder.asins, "a copy of it"]
    )
    assert (grown.codes[: len(ids.codes)] == ids.codes).all()
    print(f"a copy of it would get {grown.codes[-1].tolist()}")


if __name__ == "__main__":
    main()
