"""Texts laid end to end in arrays, so that millions of them can be mapped from files.

Where lists of Python's strings and dicts take kilobytes an item and minutes to make, these open at
once; a text is decoded when somebody asks for it.

Shapes: N texts or items, A attributes of all items, B bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

from recformer.data.sequences import offsets_of
from recformer.files import sha256_of

AT_ONCE = 8192  # texts decoded at a time where all are read

# JSON can hold halves of surrogate pairs, which are no UTF-8.
ODD = "surrogatepass"


class Texts(Sequence[str]):
    """Texts in order.

    Args:
        offsets: int64 (N+1,); text i is `data[offsets[i]:offsets[i + 1]]`.
        data: uint8 (B,), UTF-8.
    """

    def __init__(self, offsets: np.ndarray, data: np.ndarray) -> None:
        self.offsets, self.data = offsets, data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Lay texts end to end."""
        encoded = [text.encode("utf-8", ODD) for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(offsets_of(lengths), np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> Texts: ...

    def __getitem__(self, place: int | slice) -> str | Texts:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                return Texts.of(self[each] for each in range(start, stop, step))
            return Texts(self.offsets[start : max(start, stop) + 1], self.data)
        place = _within(place, len(self))
        return self._decoded(place, place + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._decoded(start, min(start + AT_ONCE, len(self)))

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]

    def _decoded(self, start: int, stop: int) -> list[str]:
        borders = self.offsets[start : stop + 1]
        raw = self.data[borders[0] : borders[-1]].tobytes()
        places = (borders - borders[0]).tolist()
        return [raw[begin:end].decode("utf-8", ODD) for begin, end in pairwise(places)]


class ItemTexts(Sequence[dict[str, str]]):
    """Attributes of items in order, `{name: text}` each.

    Args:
        offsets: int64 (N+1,); item i has the attributes from offsets[i] to offsets[i + 1].
        names: uint32 (A,), the name of each attribute by its place in `name_texts`.
        name_texts: every name once.
        values: A texts.

    Attributes:
        offsets, names, name_texts, values: as given.
    """

    def __init__(
        self, offsets: np.ndarray, names: np.ndarray, name_texts: Texts, values: Texts
    ) -> None:
        self.offsets, self.names, self.name_texts, self.values = offsets, names, name_texts, values
        self._names = list(name_texts)

    @classmethod
    def of(cls, items: Iterable[Mapping[str, str]]) -> ItemTexts:
        """Lay the attributes of items end to end."""
        codes: dict[str, int] = {}
        counts, names, values = [], [], []
        for item in items:
            counts.append(len(item))
            for name, value in item.items():
                names.append(codes.setdefault(name, len(codes)))
                values.append(value)
        return cls(
            offsets_of(np.array(counts, np.int64)),
            np.array(names, np.uint32),
            Texts.of(codes),
            Texts.of(values),
        )

    @property
    def counts(self) -> np.ndarray:
        """Attributes of every item, int64 (N,)."""
        return np.diff(self.offsets)

    def digest(self) -> str:
        """Content hash of what they say, hex; from the arrays, so that nothing is decoded."""
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        values = self.values[first:last]
        return sha256_of(
            *(
                np.ascontiguousarray(array).tobytes()
                for array in (
                    self.offsets - first,
                    self.names[first:last],
                    values.offsets - values.offsets[0],
                    values.data[values.offsets[0] : values.offsets[-1]],
                    self.name_texts.offsets,
                    self.name_texts.data,
                )
            )
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, place: int) -> dict[str, str]: ...

    @overload
    def __getitem__(self, place: slice) -> ItemTexts: ...

    def __getitem__(self, place: int | slice) -> dict[str, str] | ItemTexts:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                return ItemTexts.of(self[each] for each in range(start, stop, step))
            offsets = self.offsets[start : max(start, stop) + 1]
            return ItemTexts(offsets, self.names, self.name_texts, self.values)
        place = _within(place, len(self))
        return self._decoded(place, place + 1)[0]

    def __iter__(self) -> Iterator[dict[str, str]]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._decoded(start, min(start + AT_ONCE, len(self)))

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]

    def _decoded(self, start: int, stop: int) -> list[dict[str, str]]:
        borders = self.offsets[start : stop + 1].tolist()
        first, last = borders[0], borders[-1]
        values = self.values._decoded(first, last) if last > first else []
        names = [self._names[code] for code in self.names[first:last].tolist()]
        pairs = list(zip(names, values, strict=True))
        return [dict(pairs[begin - first : end - first]) for begin, end in pairwise(borders)]


def attribute_counts(items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Attributes of every item, int64 (N,), whatever form the items have."""
    if isinstance(items, ItemTexts):
        return items.counts
    return np.fromiter(map(len, items), np.int64, len(items))


def _within(place: int, length: int) -> int:
    if not -length <= place < length:
        raise IndexError(f"place {place} of {length}")
    return int(place) % length


def _equal(own: Sequence[Any], other: object) -> bool:
    """As lists are equal: the same things in the same order."""
    if not isinstance(other, Sequence) or isinstance(other, str):
        return NotImplemented
    return len(own) == len(other) and all(a == b for a, b in zip(own, other, strict=True))
