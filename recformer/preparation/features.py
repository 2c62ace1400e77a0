"""Features out of the columns of raw files: declared once, told by their values, kept as they are.

`--features price:float category:cat genres:list hour` names columns of the interactions or of the
items. A column of the interactions that has one value an item is the item's. Times give features
without a column: `hour`, `weekday` (UTC), `since_last` (log of the seconds since the event before
it in its sequence) and `item_age` (log of the seconds since anybody first met the item).

Shapes: M interactions of all histories, N items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from recformer.data.features import KINDS, Feature, Of
from recformer.files import UserError
from recformer.preparation.histories import split_list
from recformer.preparation.splits import DROPPED, Histories, Split
from recformer.preparation.times import units_a_second
from recformer.preparation.windows import Windowed

# Features of the time of an interaction and what they are.
OF_TIME = {"hour": "cat", "weekday": "cat", "since_last": "float", "item_age": "float"}
OFS: tuple[Of, ...] = ("item", "interaction")

# A column with more different values holds ids: a table of them would be learned by heart.
MOST_CATEGORIES = 100_000
# Of larger numbers no deviation can be computed.
LARGEST = 1e100
_DAY = 86_400


@dataclass(frozen=True)
class Asked:
    """A feature as the user names it.

    Attributes:
        name: its column, or one of `OF_TIME`.
        kind: of `recformer.data.features.KINDS`; None: told by its values.
        of: "item" or "interaction"; None: told by its values.
    """

    name: str
    kind: str | None = None
    of: Of | None = None

    @classmethod
    def parse(cls, text: str) -> Asked:
        """`name`, `name:type` or `name:type:item`.

        Raises:
            ValueError: another type.
        """
        parts = text.split(":")
        kind = parts.pop(1) if len(parts) > 1 and parts[1] in KINDS else None
        of: Of | None = None
        if len(parts) > 1 and parts[1] in OFS:
            of = "item" if parts.pop(1) == "item" else "interaction"
        if len(parts) > 1 or not parts[0]:
            raise ValueError(
                f"got {text!r}, expected a column, or column:type with a type of "
                f"{', '.join(KINDS)}, or column:type:item or :interaction to say whose it is"
            )
        return cls(parts[0], kind, of)


@dataclass(frozen=True, eq=False)
class FeatureColumns:
    """The features of a preparation.

    Attributes:
        features: in the order in which they were asked for.
        interactions: column in interactions.parquet -> M values.
        items: column in item_features.parquet -> N values.
        present: feature of a column of the interactions -> int8 (M,), 1 where an interaction has a
            value, 0 where it has none. Of an item's feature the first interaction of each item says
            whether any had a value when the item was first met; the others are -1.
    """

    features: list[Feature]
    interactions: dict[str, pl.Series]
    items: dict[str, pl.Series]
    present: dict[str, np.ndarray]


def make_features(
    asked: Sequence[Asked],
    histories: Histories,
    item_columns: Mapping[str, Mapping[str, Any]],
    *,
    moments: np.ndarray | None = None,
    skip_bad: bool = False,
) -> FeatureColumns:
    """The features that were asked for.

    Args:
        asked: which; columns of the interactions stand in `histories.extra`.
        histories: as they are split.
        item_columns: column -> {item: value}, of those that the items have.
        moments: int (M,), which interactions are known before others, see `moments_of`; None: all
            are known at once.
        skip_bad: take what is no number as missing where numbers are asked for.

    Raises:
        UserError: a value that is no number, too many categories, or no times.
    """
    features: list[Feature] = []
    interactions: dict[str, pl.Series] = {}
    items: dict[str, pl.Series] = {}
    present: dict[str, np.ndarray] = {}
    if moments is None:
        moments = np.zeros(len(histories.sequences.items), dtype=np.int32)
    for one in asked:
        of: Of = "interaction"
        if one.name in item_columns:
            own = item_columns[one.name]
            raw = pl.Series([own.get(name) for name in histories.item_names], strict=False)
            of = "item"
        elif histories.extra is not None and one.name in histories.extra.columns:
            raw = histories.extra[one.name]
        else:
            raw = of_time(one.name, histories)
        kind = one.kind or OF_TIME.get(one.name) or _kind(raw)
        values = _typed(raw, kind, one.name, skip_bad)
        told = None
        if of == "interaction":
            has_value = np.array(values.is_not_null(), dtype=np.int8)
            if one.name not in OF_TIME:
                of, values, told = _whose(one, values, histories, moments)
            if of == "item":
                has_value = _of_new_items(has_value, histories.sequences.items, moments)
            present[one.name] = has_value
        members = values.explode() if kind == "list" else values
        distinct = members.drop_nulls().n_unique()
        if kind != "float" and distinct > MOST_CATEGORIES:
            raise UserError(
                f"--features {one.name}: {distinct:,} different values, expected at most "
                f"{MOST_CATEGORIES:,} categories: they are ids or texts; leave the column out, or "
                f"put a coarser one in its place"
            )
        missing = int(values.is_null().sum())
        if missing == len(values):
            raise UserError(f"--features {one.name}: no {of} has a value")
        feature = Feature(one.name, kind, of, distinct, missing)
        features.append(feature)
        (items if of == "item" else interactions)[feature.column] = values
        if told is not None:
            items[feature.told_column] = told
    return FeatureColumns(features, interactions, items, present)


def moments_of(split: Split) -> np.ndarray:
    """When each interaction is known, int32 (M,): its window; or 0 of training, 1 of validation,
    2 of the test, 3 of what is in no part."""
    if isinstance(split, Windowed):
        return split.windows.astype(np.int32)
    return np.where(split.parts == DROPPED, 3, split.parts).astype(np.int32)


def _of_new_items(has_value: np.ndarray, items: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Of the moment in which an item was first met: 1 or 0 at its first interaction, whether any of
    that moment has a value; -1 elsewhere. Int8 (M,) of int8, int and int (M,)."""
    order = np.argsort(moments, kind="stable")
    met, places = np.unique(items[order], return_index=True)
    first = order[places]  # interaction of each item met
    of_item = np.zeros(int(items.max(initial=-1)) + 1, dtype=moments.dtype)
    of_item[met] = moments[first]
    told = np.zeros(len(of_item), dtype=bool)
    told[items[(moments == of_item[items]) & (has_value > 0)]] = True
    found = np.full(len(items), -1, dtype=np.int8)
    found[first] = told[met]
    return found


def check_everywhere(columns: FeatureColumns, parts: Mapping[str, np.ndarray]) -> None:
    """Refuse a column of interactions that a part of the data lacks altogether, and not by chance.

    Args:
        columns: the features.
        parts: name of a part of the data -> its interactions, bool (M,).

    Raises:
        UserError: names the feature and the part.
    """
    for name, present in columns.present.items():
        what = "interactions" if (present >= 0).all() else "new items"
        for part, chosen in parts.items():
            inside, outside = (present[mask & (present >= 0)] for mask in (chosen, ~chosen))
            others = (outside.sum() + 0.5) / (len(outside) + 1)  # of few, none is certain
            if len(outside) and not inside.any() and (1 - others) ** len(inside) < 0.01:
                raise UserError(
                    f"--features {name}: none of the {len(inside):,} {what} of {part} has a value, "
                    f"{others:.0%} of the others have one: a model would be judged without what it "
                    f"was trained with; leave the feature out, or complete the data"
                )


def of_time(name: str, histories: Histories) -> pl.Series:
    """One of `OF_TIME`, M values."""
    times = histories.times
    if times is None:
        raise UserError(
            f"--features {name} needs times, the interactions have none: name their column with "
            f"--time_column"
        )
    units = units_a_second(times, f"--features {name}")
    seconds = times // units
    if name == "hour":
        return pl.Series((seconds % _DAY // 3600).astype(str))
    if name == "weekday":  # 1970 began on a Thursday; Monday is 0
        return pl.Series(((seconds // _DAY + 3) % 7).astype(str))
    sequences = histories.sequences
    if name == "since_last":
        passed = np.diff(times, prepend=times[:1]) / units
        values = pl.Series(np.log1p(np.maximum(passed, 0)))
        first = np.zeros(len(times), dtype=bool)
        first[sequences.offsets[:-1][sequences.lengths > 0]] = True
        return pl.select(pl.when(pl.Series(~first)).then(values)).to_series()
    assert name == "item_age"
    earliest = np.full(len(histories.item_names), np.iinfo(np.int64).max)
    np.minimum.at(earliest, sequences.items, times)
    return pl.Series(np.log1p((times - earliest[sequences.items]) / units))


def _kind(raw: pl.Series) -> str:
    """Kind of values: numbers with fractions, lists, or categories."""
    if raw.dtype.is_float():
        whole = raw.drop_nulls().drop_nans()
        return "cat" if len(whole) and bool((whole == whole.floor()).all()) else "float"
    if raw.dtype.is_decimal():
        return "float"
    if isinstance(raw.dtype, pl.List | pl.Array):
        return "list"
    if raw.dtype != pl.String:
        return "cat"
    found = raw.drop_nulls().str.strip_chars()
    found = found.filter(found != "")
    if not len(found):
        return "cat"
    numbers = found.cast(pl.Float64, strict=False)
    if not numbers.null_count() and found.str.contains(r"[.eE]").any():
        return "float"
    looks_like_lists = found.str.starts_with("[") & found.str.ends_with("]")
    with_bars = int(found.str.contains("|", literal=True).sum())
    if looks_like_lists.all() or 5 * with_bars > len(found):
        return "list"
    return "cat"


def _typed(raw: pl.Series, kind: str, name: str, skip_bad: bool) -> pl.Series:
    """Values as they are kept; null where there is none."""
    if kind == "list":
        return _lists(raw, name)
    if isinstance(raw.dtype, pl.List | pl.Array | pl.Struct):
        raise UserError(f"--features {name}: its values are lists, expected {name}:list")
    if kind == "float":
        texts = raw.str.strip_chars() if raw.dtype == pl.String else raw
        numbers = texts.cast(pl.Float64, strict=False)
        numbers = numbers.set(~(numbers.abs() <= LARGEST).fill_null(True), None)
        wrong = numbers.is_null() & texts.is_not_null()
        if raw.dtype == pl.String:
            wrong &= texts != ""
        elif raw.dtype.is_float():
            wrong &= texts.is_not_nan()
        if wrong.any() and not skip_bad:
            raise UserError(
                f"--features {name}:float: {texts.filter(wrong)[0]!r} is no number up to "
                f"{LARGEST:.0e}: mend it, take what is none as missing with --skip_bad_lines, or "
                f"ask for {name}:cat"
            )
        return numbers
    texts = raw.cast(pl.String).str.strip_chars()
    if raw.dtype.is_float():
        texts = texts.str.replace(r"\.0$", "")
    return texts.set(texts == "", None)


def _lists(raw: pl.Series, name: str) -> pl.Series:
    if isinstance(raw.dtype, pl.List | pl.Array):
        values = raw.cast(pl.List(pl.String))
    else:
        parsed: list[list[str] | None] = []
        for text in raw.cast(pl.String).to_list():
            if text is None or not text.strip():
                parsed.append(None)
            elif "|" in text and not text.startswith("["):
                parsed.append([part.strip() for part in text.split("|")])
            else:
                found = split_list(text)
                if found is None:
                    raise UserError(f"--features {name}:list: {text[:60]!r} is no list")
                parsed.append([str(part) for part in found])
        values = pl.Series(parsed, dtype=pl.List(pl.String))
    values = values.list.drop_nulls()
    return values.set(values.list.len() == 0, None)


def _whose(
    one: Asked, values: pl.Series, histories: Histories, moments: np.ndarray
) -> tuple[Of, pl.Series, pl.Series | None]:
    """A column of the interactions is the item's if every item has one value, or the user says so;
    then it is the first one that anybody met.

    Returns:
        Whose it is, the values, and of an item's the moment of the interaction that told it.
    """
    if one.of == "interaction":
        return "interaction", values, None
    items = histories.sequences.items
    keys = (moments,) if histories.times is None else (histories.times, moments)
    order = np.lexsort(keys)  # what is known first, by time
    frame = pl.DataFrame({"item": items, "value": values, "told": moments})[order].filter(
        pl.col("value").is_not_null()
    )
    if one.of is None:
        several = frame.group_by("item").agg(pl.col("value").n_unique() > 1)["value"]
        if several.any():
            return "interaction", values, None
    first = frame.unique("item", keep="first", maintain_order=True)
    every = pl.DataFrame({"item": np.arange(len(histories.item_names), dtype=np.int32)})
    every = every.join(first, on="item", how="left", maintain_order="left")
    return "item", every["value"], every["told"]
