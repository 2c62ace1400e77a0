"""One code sequence an item: collisions resolved, new items added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from baselines.semantic_ids.ids import SemanticIds
from baselines.semantic_ids.quantisers import Quantiser
from baselines.semantic_ids.rkmeans import quantise, squared_distances
from recformer.files import UserError, sha256_of


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
    check_room(len(used) + len(codes), levels, codebook_size)
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


def check_room(num_items: int, levels: int, codebook_size: int) -> None:
    """Refuse fewer codes than items.

    Raises:
        UserError: names the flags that make room.
    """
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
