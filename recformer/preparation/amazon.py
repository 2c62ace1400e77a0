"""Raw Amazon files, and other JSON lines: reviews and products out of them.

Reviews hold `reviewerID`, `asin`, `unixReviewTime` (seconds; in 2023 `user_id`, `parent_asin`,
`timestamp` in milliseconds); metadata hold `asin` (in 2023 `parent_asin`) and the attributes of a
product. Metadata of 2014 and the Steam files are Python literals (`{u'id': u'10'}`), not JSON.
`recformer.preparation.json_lines` reads the lines.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from recformer.files import UserError
from recformer.preparation.bad_lines import BadLineError, BadLines
from recformer.preparation.json_lines import look_at, mend_key, mend_text, read_rows
from recformer.preparation.splits import Interactions
from recformer.preparation.text import OddValueError, clean_text, text_parts
from recformer.preparation.times import NO_TIME, in_one_unit, parse_time

DEFAULT_ATTRIBUTES = ("title", "brand", "category")

_FEW_TEXTS, _MANY_TEXTS = 5_000, 1_000_000

_Key = Annotated[str, msgspec.Meta(min_length=1)]
_Time = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


# Names that stand in no file: fields that are not read must not be found by their own.
_NOT_READ = {"billionths": "(billionths)", "rating": "(rating)", "event": "(event)"}


class Review(msgspec.Struct, gc=False, rename=_NOT_READ):
    """The fields of a review that are read.

    Attributes:
        reviewerID, asin: user and item.
        unixReviewTime: whole seconds, or whatever unit the source has.
        billionths: of that unit, which the time is later.
        rating, event: where they are asked for.
    """

    reviewerID: _Key
    asin: _Key
    unixReviewTime: _Time
    billionths: int = 0
    rating: float = 0.0
    event: Any = None


@dataclass(frozen=True)
class ReviewColumns:
    """Names of a line's fields; None for `time`, `rating` or `event` where there is none."""

    user: str = "reviewerID"
    item: str = "asin"
    time: str | None = "unixReviewTime"
    rating: str | None = "overall"
    event: str | None = None


_AMAZON_2018 = ReviewColumns()


def check_raw_files(
    reviews: Sequence[str | os.PathLike], metadata: Sequence[str | os.PathLike] = ()
) -> None:
    """Look at the first lines of every file, before any long work.

    Raises:
        FileNotFoundError: files are missing; all of them are named.
        UserError: a file is empty, is not gzip, or holds the other kind of lines.
    """
    missing = [str(path) for path in (*reviews, *metadata) if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}")
    for path in map(Path, reviews):
        kinds = _kinds(path)
        if kinds and "reviews" not in kinds:
            raise UserError(
                f"{path} holds product metadata, expected reviews (reviewerID, asin, "
                f"unixReviewTime): are the two files swapped?"
            )
    for path in map(Path, metadata):
        if _kinds(path) == {"reviews"}:
            raise UserError(
                f"{path} holds reviews, expected product metadata (asin, title, brand, …): are the "
                f"two files swapped?"
            )


def read_reviews(
    path: str | os.PathLike,
    bad_lines: BadLines,
    columns: ReviewColumns | None = None,
    *,
    rating: bool = False,
    event: bool = False,
    encoding: str | None = None,
) -> Iterator[Review]:
    """The reviews of a file, in file order.

    Args:
        path: a review file.
        bad_lines: what to do with lines that cannot be used.
        columns: which fields hold what, Amazon 2018's where not given. Without a field of times,
            all are 0.
        rating, event: read these too.
        encoding: see `lines.text_lines`.

    Raises:
        UserError: the file is damaged or has no usable line, or `bad_lines` refuses one.
    """
    columns = columns or _AMAZON_2018

    def mend(row: dict[str, Any]) -> Review:
        return _mend_review(row, columns, rating, event)

    once = [columns.user, columns.item, columns.time]
    once += [columns.rating] if rating else []
    once += [columns.event] if event else []
    if columns == _AMAZON_2018 and not (rating or event):
        return read_rows(Path(path), Review, mend, bad_lines, once, encoding)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [("reviewerID", _Key), ("asin", _Key)]
    fields += [("rating", float)] if rating else []
    fields += [("event", str)] if event else []
    fields += [("unixReviewTime", _Time) if columns.time else ("unixReviewTime", _Time, 0)]
    fields += [("billionths", int, 0)]
    fields += [] if rating else [("rating", float, 0.0)]
    fields += [] if event else [("event", Any, None)]
    names: Any = {
        **_NOT_READ,
        "reviewerID": columns.user,
        "asin": columns.item,
        "unixReviewTime": columns.time or "(no time)",
        **({"rating": columns.rating} if rating else {}),
        **({"event": columns.event} if event else {}),
    }
    row_type: Any = msgspec.defstruct("Review", fields, rename=names, gc=False)
    return read_rows(Path(path), row_type, mend, bad_lines, once, encoding)


def read_products(
    path: str | os.PathLike,
    attributes: Sequence[str],
    bad_lines: BadLines,
    key: str = "asin",
    encoding: str | None = None,
) -> Iterator[tuple[Any, ...]]:
    """`(key, value of the first attribute, …)` of every line, in file order.

    Values are what the JSON holds, None where there is nothing.

    Raises:
        UserError: the file is damaged or has no usable line, or `bad_lines` refuses one.
    """
    # Field names of a struct must be Python names and JSON keys need not be: keys are renamed. The
    # item's key is there already and may be asked for as an attribute.
    names = {f"value_{place}": name for place, name in enumerate(attributes) if name != key}
    row_type = msgspec.defstruct(
        "Product",
        [("asin", _Key), *((field_name, Any, None) for field_name in names)],
        rename={"asin": key, **names},
        gc=False,
    )

    def mend(row: dict[str, Any]) -> msgspec.Struct:
        values = [mend_text(row.get(name)) for name in names.values()]
        return row_type(mend_key(row, key), *values)

    # Only the key, once a line: looking for every attribute would take as long as reading them.
    found = read_rows(Path(path), row_type, mend, bad_lines, [key], encoding)
    rows = map(msgspec.structs.astuple, found)
    if key not in attributes:
        return rows
    place = list(attributes).index(key)
    return ((row[0], *row[1 : place + 1], row[0], *row[place + 1 :]) for row in rows)


def read_metadata(
    paths: Sequence[str | os.PathLike],
    attributes: Sequence[str] | Mapping[str, str] = DEFAULT_ATTRIBUTES,
    *,
    clean: bool = True,
    bad_lines: BadLines | None = None,
    only: Container[str] | None = None,
    required: str | None = None,
    key: str = "asin",
    rows: Iterable[tuple[Any, ...]] | None = None,
    encoding: str | None = None,
) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """The text of every product: `{asin: {attribute: text}}`, attributes in the order asked for.

    A later row of the same asin replaces the earlier one, unless nothing is left of it. Lists are
    joined by one space. Null and missing values are absent attributes, and when cleaning so are
    values without text; products without any attribute are left out.

    Args:
        paths: metadata files, read one after the other.
        attributes: keys of the JSON objects, or {name to give: key}.
        clean: take markup and script out of the text; otherwise text as it stands in the file.
        bad_lines: what to do with lines that cannot be used; by default the first ends the run.
        only: asins to keep.
        required: leave out products that have null here or nothing at all.
        key: field of the product's id.
        rows: `(id, value of the first attribute, …)` from elsewhere, instead of the files.
        encoding: of the files, see `lines.text_lines`.

    Returns:
        The products and how many rows there were, were duplicates, were left out and why.

    Raises:
        UserError: see `read_products`.
    """
    bad_lines = bad_lines or BadLines()
    products: dict[str, dict[str, str]] = {}
    left_out: dict[str, str] = {}
    num_rows = num_duplicates = num_odd = num_without_reviews = 0
    texts = [_Texts(clean) for _ in attributes]
    # When cleaning, a line break keeps script in one part of a list from eating the next part.
    border = "\n" if clean else " "

    names = list(attributes)
    fields = list(attributes.values()) if isinstance(attributes, Mapping) else names
    sources = (
        [rows]
        if rows is not None
        else (read_products(path, fields, bad_lines, key, encoding) for path in paths)
    )
    for source in sources:
        for asin, *values in source:
            num_rows += 1
            if only is not None and asin not in only:
                num_without_reviews += 1
                continue
            item = {}
            complete = True
            for name, value, text_of in zip(names, values, texts):
                if value is None:
                    complete = complete and name != required
                    continue
                try:
                    text = text_of(_joined(value, border))
                except (OddValueError, RecursionError):  # the latter: lists a thousand deep
                    num_odd += 1
                    continue
                if text or not clean:
                    item[name] = text
            if asin in products or asin in left_out:
                num_duplicates += 1
            if item and complete:
                products[asin] = item
                if left_out:
                    left_out.pop(asin, None)
            elif asin not in products:
                left_out[asin] = f"products_without_{required}" if item else "products_without_text"

    counts = {
        "rows": num_rows,
        "duplicate_rows": num_duplicates,
        "products": len(products),
        "products_without_text": 0,
        "values_that_are_no_text": num_odd,
    }
    if only is not None:
        counts["rows_of_products_without_reviews"] = num_without_reviews
    if required is not None:
        counts[f"products_without_{required}"] = 0
    return products, {**counts, **Counter(left_out.values())}


def read_interactions(
    path: str | os.PathLike,
    known: Collection[str] | None,
    bad_lines: BadLines | None = None,
    *,
    columns: ReviewColumns | None = None,
    min_rating: float | None = None,
    events: Container[str] | None = None,
    encoding: str | None = None,
) -> tuple[Interactions, dict[str, int]]:
    """The reviews of known products as arrays, in file order.

    Takes 16 bytes an interaction beside the names of users and items; 24 where times have
    fractions.

    Args:
        path: a review file.
        known: asins that count; reviews of others are left out and counted. None: all.
        bad_lines: what to do with lines that cannot be used; by default the first ends the run.
        columns: which fields hold what, Amazon 2018's where not given.
        min_rating: leave out and count reviews rated lower.
        events: leave out and count what is of another type, see `ReviewColumns.event`.
        encoding: see `lines.text_lines`.

    Returns:
        The interactions, and how many reviews there were and were of unknown products.

    Raises:
        UserError: see `read_reviews`.
    """
    path = Path(path)
    users, items, times, billionths = array("i"), array("i"), array("q"), array("q")
    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    reviews = KnownReviews(
        path,
        known,
        bad_lines or BadLines(),
        columns=columns,
        min_rating=min_rating,
        events=events,
        encoding=encoding,
    )
    for review in reviews:
        if review.billionths and not billionths:
            billionths.extend([0] * len(times))
        if billionths or review.billionths:
            billionths.append(review.billionths)
        users.append(user_codes.setdefault(review.reviewerID, len(user_codes)))
        items.append(item_codes.setdefault(review.asin, len(item_codes)))
        times.append(review.unixReviewTime)

    moments = np.frombuffer(times, np.int64) if times else np.empty(0, np.int64)
    if billionths:
        moments, too_large = in_one_unit(moments, np.frombuffer(billionths, np.int64))
        if too_large.any():
            raise too_large_time(path, moments[too_large][0])
    interactions = Interactions(
        users=np.frombuffer(users, np.int32) if users else np.empty(0, np.int32),
        items=np.frombuffer(items, np.int32) if items else np.empty(0, np.int32),
        times=moments,
        user_names=list(user_codes),
        item_names=list(item_codes),
        has_times=columns is None or columns.time is not None,
        first_unknown=reviews.first_unknown,
    )
    return interactions, reviews.counts()


class KnownReviews:
    """The reviews of known products of a file, in file order, and counts of what was left out.

    Args:
        path, known, bad_lines, columns, min_rating, events, encoding: see `read_interactions`.

    Attributes:
        first_unknown: the first product that is not known, of the reviews so far.
    """

    def __init__(
        self,
        path: Path,
        known: Collection[str] | None,
        bad_lines: BadLines,
        *,
        columns: ReviewColumns | None = None,
        min_rating: float | None = None,
        events: Container[str] | None = None,
        encoding: str | None = None,
    ) -> None:
        self.first_unknown: str | None = None
        self._known, self._min_rating, self._events = known, min_rating, events
        self._kept = self._unknown = self._below = self._other_events = 0
        self._reviews = read_reviews(
            path,
            bad_lines,
            columns,
            rating=min_rating is not None,
            event=events is not None,
            encoding=encoding,
        )

    def __iter__(self) -> Iterator[Review]:
        known, events, min_rating = self._known, self._events, self._min_rating
        for review in self._reviews:
            if events is not None and review.event not in events:
                self._other_events += 1
            elif known is not None and review.asin not in known:
                self._unknown += 1
                self.first_unknown = self.first_unknown or review.asin
            elif min_rating is not None and review.rating < min_rating:
                self._below += 1
            else:
                self._kept += 1
                yield review

    def counts(self) -> dict[str, int]:
        """Reviews so far, and those that were left out, for dataset.json."""
        return {
            "reviews": self._kept + self._unknown + self._below + self._other_events,
            "reviews_of_unknown_products": self._unknown,
            **({} if self._events is None else {"reviews_of_other_events": self._other_events}),
            **({} if self._min_rating is None else {"reviews_below_min_rating": self._below}),
        }


def too_large_time(path: Path, time: int) -> UserError:
    """What to say of a time that does not fit the unit of the others."""
    return UserError(
        f"{path} has times with fractions and the time {time} among them, which is too large for "
        f"their unit: mend or remove this one"
    )


class _Texts:
    """Texts of one attribute, cleaned or not, remembered for as long as they repeat.

    Brands and categories do: each is cleaned once and all products share the one copy. Titles do
    not: once more than half of a few thousand are new, remembering them ends.
    """

    def __init__(self, clean: bool) -> None:
        self._clean = clean
        self._known: dict[str, str] = {}
        self._num_asked = 0
        self._remember = True

    def __call__(self, raw: str) -> str:
        self._num_asked += 1
        if raw in self._known:
            return self._known[raw]
        text = clean_text(raw) if self._clean else raw
        if self._remember:
            self._known[raw] = text
            if len(self._known) > min(max(_FEW_TEXTS, self._num_asked // 2), _MANY_TEXTS):
                self._known, self._remember = {}, False
        return text


def _joined(value: Any, border: str) -> str:
    if type(value) is str:
        return value
    if type(value) is list:
        try:
            return border.join(value)
        except TypeError:
            pass  # not all of it is text
    return border.join(text_parts(value))


def _mend_review(row: dict[str, Any], columns: ReviewColumns, rating: bool, event: bool) -> Review:
    review = Review(mend_key(row, columns.user), mend_key(row, columns.item), 0)
    if columns.time is not None:
        value = row.get(columns.time)
        time = parse_time(value)
        if value is None or value == "":
            raise BadLineError(f"no {columns.time}")
        if time is None:
            raise BadLineError(f"{columns.time} {NO_TIME}", value)
        review.unixReviewTime, review.billionths = time
    if rating and columns.rating is not None:
        value = row.get(columns.rating)
        if value is None or value == "":
            raise BadLineError(f"no {columns.rating}")
        try:
            review.rating = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            review.rating = math.nan
        if review.rating != review.rating:
            raise BadLineError(f"{columns.rating} is no number", value)
    if event and columns.event is not None:
        review.event = mend_key(row, columns.event)
    return review


def _kinds(path: Path) -> set[str]:
    """Kinds of the first lines of a file: "reviews", "metadata", both, or none that is known."""
    kinds = set()
    metadata = {"title", "brand", "category", "description", "price", "also_buy", "categories"}
    for row in look_at(path):
        # Reviews of 2023 have a title too.
        if {"reviewerID", "unixReviewTime", "user_id"} & row.keys():
            kinds.add("reviews")
        elif metadata & row.keys():
            kinds.add("metadata")
    return kinds
