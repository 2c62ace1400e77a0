"""Semantic ids: every item as a short tuple of codes, unique to it.

`python -m baselines.semantic_ids --data_path FOLDER --text_encoder ENCODER --output_dir DIR` fits a
quantiser to the items' vectors and writes

    semantic_ids.json       the ids, see below
    quantiser.safetensors   what made them: gives new items their ids (`--extend DIR`)
    report.json             reconstruction, code usage and entropy a level, collisions, seconds
    hierarchy.md, .png      size and typical words of every first-level code

`semantic_ids.json` is the contract between what makes codes and what learns to generate them:

    levels          L, codes that come from the item's content
    codebook_size   [K_1, …, K_L], and K_d where a level was added that tells apart items of the
                    same content
    codes           {asin: [c_1, …, c_L] or [c_1, …, c_L, d]}, each from 0; no two items alike
    method          what made the codes
    vectors         key of the item vectors that they were made from
    hash            SHA-256 of items and codes, in the order of the asins

Content codes of two items can be the same. `add_level` appends a number that tells such items
apart; `reassign` moves all but one of them to the nearest free code. Both go by the order of the
asins, not by item ids, so that a quantiser gives the same items the same ids in every folder.

Shapes: N items, L levels, L' levels with an added one, K codes of a level, H width of item vectors,
D of latents.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from transformers import HfArgumentParser

from baselines import code_words
from baselines.rkmeans import ResidualKMeans, quantise, squared_distances
from baselines.rqvae import RQVAE
from baselines.text_vectors import text_vectors
from recformer.allocator import keep_freed_memory
from recformer.data.processed import ProcessedFolder
from recformer.files import (
    UserError,
    atomic_write,
    exit_with_message,
    read_json,
    sha256_of,
    write_json,
)
from recformer.training.arguments import flag

FILE = "semantic_ids.json"
QUANTISER_FILE = "quantiser.safetensors"
TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

Quantiser = RQVAE | ResidualKMeans
METHODS: dict[str, type[Quantiser]] = {kind.method: kind for kind in (RQVAE, ResidualKMeans)}

# What `semantic_ids.json` holds.
TYPES = {
    "levels": int,
    "codebook_size": list,
    "codes": dict,
    "method": str,
    "vectors": str,
    "hash": str,
}


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Unique codes of items.

    Attributes:
        asins: N item keys.
        codes: int64 (N, L'), a row an item, in the order of `asins`.
        levels: L; where L' is L + 1 the last column only tells apart items of the same L codes.
        codebook_size: L' sizes; every code of a column is below its size.
        method: what made the codes.
        vectors: key of the item vectors that they were made from.

    Raises:
        ValueError: codes outside their codebook, of another shape, or of two items at once.
    """

    asins: list[str]
    codes: np.ndarray
    levels: int
    codebook_size: list[int]
    method: str
    vectors: str

    def __post_init__(self) -> None:
        sizes = np.array(self.codebook_size)
        if self.codes.shape != (len(self.asins), len(sizes)):
            raise ValueError(
                f"codes have the shape {self.codes.shape}, expected {len(self.asins)} items x "
                f"{len(sizes)} levels"
            )
        if len(sizes) not in (self.levels, self.levels + 1):
            raise ValueError(
                f"{len(sizes)} codebook sizes for {self.levels} levels, expected as many or 1 more"
            )
        if ((self.codes < 0) | (self.codes >= sizes)).any():
            raise ValueError(f"codes outside their codebooks, whose sizes are {sizes.tolist()}")
        _, first, counts = np.unique(self.codes, axis=0, return_index=True, return_counts=True)
        if (counts > 1).any():
            code = self.codes[first[counts > 1][0]]
            shared = [self.asins[row] for row in np.flatnonzero((self.codes == code).all(1))[:2]]
            raise ValueError(f"{shared[0]!r} and {shared[1]!r} have the same id {code.tolist()}")

    @property
    def hash(self) -> str:
        """SHA-256 of items and codes; the order of the items does not matter."""
        order = sorted(range(len(self.asins)), key=self.asins.__getitem__)
        asins = json.dumps([self.asins[row] for row in order])
        return sha256_of(asins, self.codes[order].astype("<i8").tobytes())

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all."""
        value = {
            "levels": self.levels,
            "codebook_size": self.codebook_size,
            "method": self.method,
            "vectors": self.vectors,
            "hash": self.hash,
            "codes": dict(zip(self.asins, self.codes.tolist(), strict=True)),
        }
        write_json(path, value)

    @classmethod
    def load(cls, path: str | os.PathLike, asins: Sequence[str] | None = None) -> SemanticIds:
        """Read and check a file.

        Args:
            path: `semantic_ids.json`.
            asins: the items wanted, in item id order, each of which must have a code; None for all
                that the file has. The hash is checked over the whole file either way.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it is not such a file, was changed by hand, or lacks one of `asins`.
        """
        value = _checked(path, read_json(path))
        try:
            ids = cls(
                asins=list(value["codes"]),
                codes=np.array(list(value["codes"].values()), dtype=np.int64),
                levels=value["levels"],
                codebook_size=value["codebook_size"],
                method=value["method"],
                vectors=value["vectors"],
            )
        except (ValueError, OverflowError) as error:
            raise UserError(f"{path}: {error}; make the ids again") from error
        if ids.hash != value["hash"]:
            raise UserError(
                f"{path} holds other codes than its hash says ({ids.hash[:12]}, expected "
                f"{value['hash'][:12]}): it was changed after it was written; make the ids again"
            )
        if asins is None:
            return ids
        rows = {asin: row for row, asin in enumerate(ids.asins)}
        missing = [asin for asin in asins if asin not in rows]
        if missing:
            raise UserError(
                f"{path} has no code for {len(missing):,} of {len(asins):,} items, {missing[0]!r} "
                f"the first: extend it with `python -m baselines.semantic_ids --extend`"
            )
        chosen = ids.codes[[rows[asin] for asin in asins]]
        return cls(list(asins), chosen, ids.levels, ids.codebook_size, ids.method, ids.vectors)


def _checked(path: str | os.PathLike, value: Any) -> dict[str, Any]:
    """`value` if it has the form of the file.

    Raises:
        UserError: otherwise.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected semantic ids")
    for name, kind in TYPES.items():
        if type(value.get(name)) is not kind:
            shown = json.dumps(value.get(name))[:60]
            raise UserError(f"{path} has {shown} as its {name!r}, expected semantic ids")
    if not all(type(size) is int for size in value["codebook_size"]):
        raise UserError(f"{path}: 'codebook_size' must be a list of whole numbers")
    for asin, row in value["codes"].items():
        if not isinstance(row, list) or set(map(type, row)) != {int}:
            raise UserError(
                f"{path}: {asin!r} has {json.dumps(row)[:60]}, expected a list of codes"
            )
    return value


def add_level(
    codes: np.ndarray, asins: Sequence[str], taken: np.ndarray | None = None
) -> np.ndarray:
    """Append to each item's codes a number from 0 on, the next that no item of these codes has.

    Args:
        codes: int64 (N, L).
        asins: N of them; items of the same codes are numbered in their order.
        taken: int64 (M, L + 1) ids of other items, which keep their numbers.

    Returns:
        int64 (N, L + 1).
    """
    following: dict[tuple[int, ...], int] = {}
    for *content, number in [] if taken is None else taken.tolist():
        following[tuple(content)] = max(number + 1, following.get(tuple(content), 0))
    numbers = np.empty((len(codes), 1), dtype=np.int64)
    contents = [tuple(row) for row in codes.tolist()]
    for row in sorted(range(len(asins)), key=asins.__getitem__):
        numbers[row] = following.get(contents[row], 0)
        following[contents[row]] = int(numbers[row, 0]) + 1
    return np.concatenate([codes, numbers], axis=1)


def reassign(
    codes: np.ndarray,
    latents: np.ndarray,
    codebooks: np.ndarray,
    asins: Sequence[str],
    taken: np.ndarray | None = None,
) -> np.ndarray:
    """Move items whose codes are taken to the nearest free ones.

    Of the items of the same codes the first in the order of the asins keeps them. Then the others
    move, in this order, each to the first free of `nearest_first`.

    Args:
        codes: int64 (N, L).
        latents: (N, D), what was quantised.
        codebooks: (L, K, D).
        asins: N of them.
        taken: int64 (M, L) ids of other items.

    Returns:
        int64 (N, L), no two rows alike.

    Raises:
        UserError: there are fewer codes than items.
    """
    used = set() if taken is None else set(map(tuple, taken.tolist()))
    levels, codebook_size, _ = codebooks.shape
    _check_room(len(used) + len(codes), levels, codebook_size)
    ids = [tuple(row) for row in codes.tolist()]
    waiting = []
    for row in sorted(range(len(asins)), key=asins.__getitem__):
        if ids[row] in used:
            waiting.append(row)
        used.add(ids[row])
    walks: dict[bytes, Iterator[tuple[int, ...]]] = {}
    for row in waiting:
        # Items of the same content go on where the one before them found its place.
        walk = walks.setdefault(latents[row].tobytes(), nearest_first(latents[row], codebooks))
        ids[row] = next(code for code in walk if code not in used)
        used.add(ids[row])
    return np.array(ids, dtype=np.int64).reshape(codes.shape)


def _check_room(num_items: int, levels: int, codebook_size: int) -> None:
    """Raises UserError where there are fewer codes than items."""
    if num_items > codebook_size**levels:
        raise UserError(
            f"{num_items:,} items and {codebook_size} codes at {levels} levels: raise "
            f"--codebook_size or --levels, or use --collisions level"
        )


def nearest_first(latent: np.ndarray, codebooks: np.ndarray) -> Iterator[tuple[int, ...]]:
    """All codes, those closest to a latent (D,) first at every level; the last level moves first.

    So a code keeps as many of the first levels as it can.
    """
    order = squared_distances(latent[None], codebooks[0])[0].argsort(kind="stable").tolist()
    for code in order:
        if len(codebooks) == 1:
            yield (code,)
        else:
            residual = latent.astype(np.float64) - codebooks[0][code]
            for rest in nearest_first(residual, codebooks[1:]):
                yield (code, *rest)


def code_statistics(codes: np.ndarray, codebook_size: int) -> dict[str, Any]:
    """How a quantiser spreads items over its codes, before any are told apart.

    Args:
        codes: int64 (N, L).
        codebook_size: K.

    Returns:
        `usage` (share of codes that some item has) and `entropy` (bits; at most log2 K) a level;
        `colliding_items` (that share all their codes with another) and `largest_collision`.
    """
    usage, entropy = [], []
    for level in codes.T:
        share = np.bincount(level, minlength=codebook_size) / len(level)
        share = share[share > 0]
        usage.append(len(share) / codebook_size)
        entropy.append(float((share * np.log2(1 / share)).sum()))
    _, counts = np.unique(codes, axis=0, return_counts=True)
    return {
        "usage": usage,
        "entropy": entropy,
        "colliding_items": int(counts[counts > 1].sum()),
        "largest_collision": int(counts.max()),
    }


def reconstruction_error(
    quantiser: Quantiser, vectors: np.ndarray, codes: np.ndarray
) -> list[float]:
    """Share of the variance of item vectors (N, H) that is lost with the codes of 1, 2, … levels.

    0 for vectors that are all the same.

    Args:
        codes: int64 (N, L).
    """
    variance = np.square(vectors - vectors.mean(0)).sum()
    latents = torch.zeros(len(vectors), quantiser.codebooks.shape[2])
    lost = []
    for codebook, column in zip(quantiser.codebooks.detach(), torch.from_numpy(codes).T):
        latents += codebook[column]
        with torch.no_grad():
            restored = quantiser.decode(latents).numpy()
        squares = np.square(restored - vectors).sum()
        lost.append(float(squares / variance) if variance > 0 else 0.0)
    return lost


def save_quantiser(path: str | os.PathLike, quantiser: Quantiser, text_encoder: str) -> None:
    """Write weights, with what is needed to make the quantiser again, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in quantiser.state_dict().items()}
    metadata = {
        "method": quantiser.method,
        "settings": json.dumps(quantiser.settings),
        "text_encoder": text_encoder,
    }
    with atomic_write(path, "wb") as handle:
        handle.write(safetensors.torch.save(tensors, metadata))


def load_quantiser(path: str | os.PathLike) -> tuple[Quantiser, str]:
    """A saved quantiser, and the text encoder whose vectors it was made for.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds no quantiser.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        quantiser = METHODS[metadata["method"]](**json.loads(metadata["settings"]))
        quantiser.load_state_dict(safetensors.torch.load_file(path))
        return quantiser, metadata["text_encoder"]
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds no quantiser of semantic ids: {error!r}") from error


def content_codes(quantiser: Quantiser, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents float32 (N, D) of item vectors (N, H), and their codes int64 (N, L), not unique.

    The same on every machine, whatever the other items.
    """
    latents = quantiser.latents(vectors)
    return latents, quantise(latents, quantiser.codebooks.detach().numpy())


def unique_ids(
    quantiser: Quantiser,
    vectors: np.ndarray,
    asins: Sequence[str],
    collisions: str = "level",
) -> SemanticIds:
    """Ids of items by a quantiser.

    Args:
        vectors: (N, H).
        asins: N of them.
        collisions: "level" or "reassign", see `add_level` and `reassign`.

    Raises:
        UserError: as `reassign`.
    """
    latents, codes = content_codes(quantiser, vectors)
    levels, codebook_size, _ = quantiser.codebooks.shape
    sizes = [codebook_size] * levels
    if collisions == "level":
        codes = add_level(codes, asins)
        sizes.append(int(codes[:, -1].max()) + 1)
    else:
        codes = reassign(codes, latents, quantiser.codebooks.detach().numpy(), asins)
    order = sorted(range(len(asins)), key=asins.__getitem__)
    key = sha256_of(str(vectors.shape), np.asarray(vectors)[order].astype("<f4").tobytes())
    return SemanticIds(list(asins), codes, levels, sizes, quantiser.method, key)


def extended_ids(
    before: SemanticIds, quantiser: Quantiser, vectors: np.ndarray, asins: Sequence[str]
) -> SemanticIds:
    """The ids of `before`, none of them moved, and those of the items that it lacks.

    Only the size of an added level can grow.

    Args:
        before: made by the quantiser.
        vectors: (N, H).
        asins: N of them, known ones and new ones.

    Raises:
        UserError: as `reassign`; or most of the known items would now get another first code, so
            that the vectors are not of the encoder that the quantiser was made for.
    """
    latents, codes = content_codes(quantiser, vectors)
    rows = {asin: row for row, asin in enumerate(before.asins)}
    known = [(row, rows[asin]) for row, asin in enumerate(asins) if asin in rows]
    kept = sum(codes[row, 0] == before.codes[there, 0] for row, there in known)
    if 2 * kept < len(known):
        raise UserError(
            f"{len(known) - kept:,} of {len(known):,} known items would now get another first "
            f"code: are these the texts and the text encoder that the ids were made with?"
        )
    new = [row for row, asin in enumerate(asins) if asin not in rows]
    if not new:
        return before
    new_asins = [asins[row] for row in new]
    sizes = list(before.codebook_size)
    if len(sizes) > before.levels:
        added = add_level(codes[new], new_asins, before.codes)
        sizes[-1] = max(sizes[-1], int(added[:, -1].max()) + 1)
    else:
        codebooks = quantiser.codebooks.detach().numpy()
        added = reassign(codes[new], latents[new], codebooks, new_asins, before.codes)
    return replace(
        before,
        asins=before.asins + new_asins,
        codes=np.concatenate([before.codes, added]),
        codebook_size=sizes,
    )


@dataclass
class SemanticIdArguments:
    """Give every item of a processed folder a short tuple of codes that comes from its text."""

    data_path: str = flag("finetune_data/Scientific", "processed folder (finetune_data/process.py)")
    output_dir: str = flag("semantic_ids", "folder for the ids, the quantiser and the report")
    text_encoder: str | None = flag(
        None,
        "folder or hub id of a sentence encoder, or of a Recformer; unset: "
        f"{TEXT_ENCODER}, with --extend the one of before",
    )
    extend: str | None = flag(
        None,
        "folder that this command wrote before: its quantiser gives ids to the items that have "
        "none there, all others keep theirs",
    )
    method: str | None = flag(
        None,
        "rqvae: residual-quantised VAE; rkmeans: residual k-means, no training; unset: rqvae",
        choices=list(METHODS),
    )
    levels: int | None = flag(None, "codes of an item; unset: 3")
    codebook_size: int | None = flag(None, "codes to choose from at each level; unset: 256")
    collisions: str | None = flag(
        None,
        "items of the same codes: level adds a code that tells them apart, reassign moves all but "
        "one to the nearest free code; unset: level",
        choices=["level", "reassign"],
    )
    commitment: float | None = flag(
        None, "rqvae: weight of the loss that holds latents to their code vectors; unset: 0.25"
    )
    seed: int | None = flag(None, "of weights, k-means and batches; unset: 0")


# Flags of a new quantiser, with what they are where unset.
NEW = {
    "method": "rqvae",
    "levels": 3,
    "codebook_size": 256,
    "collisions": "level",
    "commitment": 0.25,
    "seed": 0,
}


def run(args: SemanticIdArguments) -> SemanticIds:
    """Make or extend ids, print what they are like, and write them.

    Raises:
        FileNotFoundError, UserError: as `ProcessedFolder.load`, `text_vectors`, `SemanticIds.load`,
            `extended_ids`; or flags that make no sense, alone or together.
    """
    given = {name: getattr(args, name) for name in NEW if getattr(args, name) is not None}
    _check(args.extend, given)
    chosen = NEW | given
    text_encoder = args.text_encoder or TEXT_ENCODER
    if args.extend is not None:
        before = SemanticIds.load(Path(args.extend) / FILE)
        quantiser, trained_with = load_quantiser(Path(args.extend) / QUANTISER_FILE)
        text_encoder = args.text_encoder or trained_with
    folder = ProcessedFolder.load(args.data_path)
    if args.extend is None and chosen["collisions"] == "reassign":
        _check_room(folder.num_items, chosen["levels"], chosen["codebook_size"])
    elif args.extend is not None and len(before.codebook_size) == before.levels:
        together = set(before.asins).union(folder.asins)
        _check_room(len(together), before.levels, before.codebook_size[0])
    started = time.monotonic()
    vectors = np.asarray(text_vectors(folder, text_encoder))
    seconds = {"vectors": time.monotonic() - started}

    started = time.monotonic()
    report: dict[str, Any] = {}
    if args.extend is None:
        torch.manual_seed(chosen["seed"])
        sizes = {"levels": chosen["levels"], "codebook_size": chosen["codebook_size"]}
        if chosen["method"] == "rqvae":
            quantiser = RQVAE(vectors.shape[1], **sizes, commitment=chosen["commitment"])
        else:
            quantiser = ResidualKMeans(vectors.shape[1], **sizes)
        history = quantiser.fit(vectors, chosen["seed"])
        report |= {"seed": chosen["seed"], "history": history}
        seconds["fit"] = time.monotonic() - started
        started = time.monotonic()
        ids = unique_ids(quantiser, vectors, folder.asins, chosen["collisions"])
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
    with atomic_write(output_dir / "hierarchy.md") as handle:
        handle.write(code_words.markdown(rows))
    code_words.draw(rows, output_dir / "hierarchy.png")
    write_json(output_dir / "report.json", report, indent=1)
    save_quantiser(output_dir / QUANTISER_FILE, quantiser, text_encoder)
    ids.save(output_dir / FILE)  # last: names what is complete
    print(f"written to {output_dir}: {FILE}, {QUANTISER_FILE}, report.json, hierarchy.md and .png")
    return ids


def _check(extend: str | None, given: dict[str, Any]) -> None:
    """Refuse flags that make no sense, alone or together, before any work.

    Raises:
        UserError: says which.
    """
    if extend is not None and given:
        raise UserError(f"--{next(iter(given))} is that of {extend}: leave it out with --extend")
    if given.get("method") == "rkmeans" and "commitment" in given:
        raise UserError("--commitment is no flag of --method rkmeans")
    for name, least in (("levels", 1), ("codebook_size", 2), ("commitment", 0), ("seed", 0)):
        if given.get(name, least) < least:
            raise UserError(f"--{name} {given[name]}: must be at least {least}")


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
    parser = HfArgumentParser(
        SemanticIdArguments,
        prog="python -m baselines.semantic_ids",
        description=SemanticIdArguments.__doc__,
    )
    (args,) = parser.parse_args_into_dataclasses(argv)
    keep_freed_memory()
    run(args)


if __name__ == "__main__":
    exit_with_message(main)
