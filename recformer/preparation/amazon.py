"""Raw Amazon files, and other JSON lines: one JSON object a line, gzipped or not.

Reviews hold `reviewerID`, `asin`, `unixReviewTime` (seconds; in 2023 `user_id`, `parent_asin`,
`timestamp` in milliseconds); metadata hold `asin` (in 2023 `parent_asin`) and the attributes of a
product. Metadata of 2014 are Python literals, not JSON: a file is taken for one by its first line.
Both hold many fields that nobody asked for: lines go through a typed
parser that steps over them without building anything, so that neither time nor memory grows much
with them. Only a line that does not fit the type is looked at again, with Python's own parser: it
is then mended (a number as an asin, a time as text), or it is a bad line, which stops the run with
file and line number or is left out and counted.
"""

from __future__ import annotations

import ast
import json
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from gzip import BadGzipFile
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from isal import igzip, igzip_lib
from tqdm import tqdm

from recformer.files import UserError
from recformer.preparation.splits import Interactions
from recformer.preparation.text import OddValueError, clean_text, text_parts

DEFAULT_ATTRIBUTES = ("title", "brand", "category")

_ISAL_ERROR: Any = igzip_lib.IsalError  # a class, which its stub declares as an instance
_GZIP_ERRORS: tuple[type[Exception], ...] = (EOFError, BadGzipFile, zlib.error, _ISAL_ERROR)
_LINES_A_PROGRESS_STEP = 256
_FEW_TEXTS, _MANY_TEXTS = 5_000, 1_000_000

_Key = Annotated[str, msgspec.Meta(min_length=1)]
_Time = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Row = TypeVar("_Row", bound=msgspec.Struct)


class Review(msgspec.Struct, gc=False):
    """What is kept of a review."""

    reviewerID: _Key
    asin: _Key
    unixReviewTime: _Time


@dataclass(frozen=True)
class ReviewColumns:
    """Which fields of a line are what; `time` and `rating` may be missing."""

    user: str = "reviewerID"
    item: str = "asin"
    time: str | None = "unixReviewTime"
    rating: str | None = "overall"


_AMAZON_2018 = ReviewColumns()


class BadLineError(ValueError):
    """A line that cannot be used; the message is the reason in a few words."""


@dataclass
class BadLines:
    """What happens to lines that cannot be used: the first one ends the run, or all are counted.

    Attributes:
        skip: leave bad lines out instead of ending the run.
        reasons: how many lines were left out for which reason.
        first: file, line number and reason of the first few.
    """

    skip: bool = False
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, path: Path, line_number: int, reason: str) -> None:
        """Note a bad line.

        Raises:
            UserError: bad lines are not to be skipped.
        """
        if not self.skip:
            raise UserError(
                f"{path}, line {line_number}: {reason}. Mend the file, or pass --skip_bad_lines to "
                f"leave such lines out and count them"
            )
        self.reasons[reason] += 1
        if len(self.first) < 5:
            self.first.append(f"{path.name}, line {line_number}: {reason}")

    def summary(self) -> dict[str, Any]:
        """For dataset.json: how many, why, and where the first ones are."""
        return {
            "total": self.reasons.total(),
            "reasons": dict(self.reasons),
            "first": list(self.first),
        }


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


def first_keys(path: str | os.PathLike) -> list[str]:
    """Keys of the first lines, in the order met.

    Raises:
        UserError: the file is empty or damaged, or none of its first lines is an object.
    """
    keys: dict[str, None] = {}
    for row in _first_rows(Path(path)):
        keys.update(dict.fromkeys(row))
    if not keys:
        raise UserError(f"{path}: expected one JSON object a line, found none in its first lines")
    return list(keys)


def read_reviews(
    path: str | os.PathLike, bad_lines: BadLines, columns: ReviewColumns | None = None
) -> Iterator[Review]:
    """The reviews of a file, in file order.

    Args:
        path: a review file.
        bad_lines: what to do with lines that cannot be used.
        columns: which fields hold what, Amazon 2018's where not given. Without a field of times,
            all are 0.

    Raises:
        UserError: the file is damaged or has no usable line, or `bad_lines` refuses one.
    """
    if columns is None:
        return _read_rows(Path(path), Review, _mend_review, bad_lines)
    named = {"reviewerID": columns.user, "asin": columns.item, "unixReviewTime": columns.time}

    def mend(row: dict[str, Any]) -> Review:
        return _mend_review(row, columns)

    row_type: Any = msgspec.defstruct(
        "Review",
        [
            ("reviewerID", _Key),
            ("asin", _Key),
            ("unixReviewTime", _Time) if columns.time else ("unixReviewTime", _Time, 0),
        ],
        # A field without a name in the file must not be found there by its own.
        rename={field_name: column or "\0" for field_name, column in named.items()},
        gc=False,
    )
    return _read_rows(Path(path), row_type, mend, bad_lines)


def _read_ratings(
    path: Path, bad_lines: BadLines, columns: ReviewColumns
) -> Iterator[tuple[Review, float]]:
    """Reviews with their ratings."""
    assert columns.rating is not None
    rating_column = columns.rating

    def mend(row: dict[str, Any]) -> msgspec.Struct:
        review = _mend_review(row, columns)
        try:
            rating = float(row[rating_column])
        except (KeyError, TypeError, ValueError):
            raise BadLineError(f"{rating_column} is missing or no number") from None
        if rating != rating:
            raise BadLineError(f"{rating_column} is missing or no number")
        return row_type(review.reviewerID, review.asin, rating, review.unixReviewTime)

    row_type = msgspec.defstruct(
        "RatedReview",
        [
            ("reviewerID", _Key),
            ("asin", _Key),
            ("rating", float),
            ("unixReviewTime", _Time) if columns.time else ("unixReviewTime", _Time, 0),
        ],
        rename={
            "reviewerID": columns.user,
            "asin": columns.item,
            "rating": rating_column,
            "unixReviewTime": columns.time or "\0",
        },
        gc=False,
    )
    for row in map(msgspec.structs.astuple, _read_rows(path, row_type, mend, bad_lines)):
        yield Review(row[0], row[1], row[3]), row[2]


def read_products(
    path: str | os.PathLike, attributes: Sequence[str], bad_lines: BadLines, key: str = "asin"
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
        values = [_mend_text(row.get(name)) for name in names.values()]
        return row_type(_mend_key(row, key), *values)

    rows = map(msgspec.structs.astuple, _read_rows(Path(path), row_type, mend, bad_lines))
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
        else (read_products(path, fields, bad_lines, key) for path in paths)
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
                except OddValueError:
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
    known: Container[str],
    bad_lines: BadLines | None = None,
    *,
    columns: ReviewColumns | None = None,
    min_rating: float | None = None,
) -> tuple[Interactions, dict[str, int]]:
    """The reviews of known products as arrays, in file order.

    Takes 16 bytes an interaction beside the names of users and items.

    Args:
        path: a review file.
        known: asins that count; reviews of others are left out and counted.
        bad_lines: what to do with lines that cannot be used; by default the first ends the run.
        columns: which fields hold what, Amazon 2018's where not given.
        min_rating: leave out and count reviews rated lower.

    Returns:
        The interactions, and how many reviews there were and were of unknown products.

    Raises:
        UserError: see `read_reviews`.
    """
    bad_lines = bad_lines or BadLines()
    users, items, times = array("i"), array("i"), array("q")
    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    num_unknown = num_below = 0

    def well_rated(minimum: float) -> Iterator[Review]:
        nonlocal num_below
        for review, rating in _read_ratings(Path(path), bad_lines, columns or ReviewColumns()):
            if review.asin in known and rating < minimum:
                num_below += 1
            else:
                yield review

    reviews = (
        read_reviews(path, bad_lines, columns) if min_rating is None else well_rated(min_rating)
    )
    for review in reviews:
        asin = review.asin
        if asin not in known:
            num_unknown += 1
            continue
        users.append(user_codes.setdefault(review.reviewerID, len(user_codes)))
        items.append(item_codes.setdefault(asin, len(item_codes)))
        times.append(review.unixReviewTime)

    interactions = Interactions(
        users=np.frombuffer(users, dtype=np.int32) if users else np.empty(0, np.int32),
        items=np.frombuffer(items, dtype=np.int32) if items else np.empty(0, np.int32),
        times=np.frombuffer(times, dtype=np.int64) if times else np.empty(0, np.int64),
        user_names=list(user_codes),
        item_names=list(item_codes),
        has_times=columns is None or columns.time is not None,
    )
    return interactions, {
        "reviews": len(users) + num_unknown + num_below,
        "reviews_of_unknown_products": num_unknown,
        **({} if min_rating is None else {"reviews_below_min_rating": num_below}),
    }


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


def _lines(path: Path) -> Generator[bytes, None, None]:
    """Lines of a gzip file, with a progress bar over its compressed size."""
    with (
        open(path, "rb") as raw,
        tqdm(
            total=path.stat().st_size,
            desc=path.name,
            unit="B",
            unit_scale=True,
            disable=None,  # no bar where nobody watches: a file or a pipe
            leave=False,
        ) as bar,
    ):
        try:
            plain = raw.read(1) in (b"{", b"\xef")  # an object or a byte order mark, not gzip's 1f
            raw.seek(0)
            with raw if plain else igzip.IGzipFile(fileobj=raw) as lines:
                while step := list(islice(lines, _LINES_A_PROGRESS_STEP)):
                    yield from step
                    bar.update(raw.tell() - bar.n)
        except _GZIP_ERRORS as error:
            raise UserError(
                f"{path} is cut off, damaged or not gzip ({error}): expected a whole gzip file, "
                f"fetch it again"
            ) from error


def _read_rows(
    path: Path,
    row_type: type[_Row],
    mend: Callable[[dict[str, Any]], _Row],
    bad_lines: BadLines,
) -> Iterator[_Row]:
    decode = msgspec.json.Decoder(row_type).decode
    line_number = num_rows = 0
    literal: bool | None = None
    for line in _lines(path):
        line_number += 1
        try:
            row = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            if not line.strip():
                continue
            try:
                if literal is None:
                    literal = _is_literal(line) and num_rows == 0
                row = mend(_parse(line, literal))
            except BadLineError as error:
                bad_lines.add(path, line_number, str(error))
                continue
        num_rows += 1
        yield row
    if num_rows == 0:
        found = f"{line_number} lines, none of them usable" if line_number else "an empty file"
        raise UserError(f"{path}: expected one JSON object a line, got {found}")


def _parse(line: bytes, literal: bool = False) -> dict[str, Any]:
    """A line by Python's parser, which takes NaN, lone surrogates and raw control characters."""
    try:
        row = json.loads(line.decode("utf-8-sig"), strict=False)
    except UnicodeDecodeError:
        raise BadLineError("not UTF-8") from None
    except (ValueError, RecursionError):
        if not literal:
            raise BadLineError("not valid JSON") from None
        row = _python_literal(line)
    if not isinstance(row, dict):
        raise BadLineError(f"a JSON {type(row).__name__}, expected an object")
    return row


def _is_literal(line: bytes) -> bool:
    """Whether a file that begins with this line holds Python dicts, as Amazon 2014's metadata."""
    return line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{'")


def _python_literal(line: bytes) -> Any:
    try:
        return ast.literal_eval(line.decode("utf-8-sig").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadLineError("neither valid JSON nor a Python literal") from None


def _mend_key(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or value == "":
        raise BadLineError(f"no {name}")
    if not isinstance(value, str):
        raise BadLineError(f"{name} is no text")
    return _mend_text(value)


def _mend_text(value: Any) -> Any:
    """Without lone surrogates, which no file can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_mend_text(part) for part in value]
    return value


def _mend_review(row: dict[str, Any], columns: ReviewColumns = _AMAZON_2018) -> Review:
    reviewer, asin = _mend_key(row, columns.user), _mend_key(row, columns.item)
    name = columns.time
    if name is None:
        return Review(reviewer, asin, 0)
    time = row.get(name)
    if time is None or time == "":
        raise BadLineError(f"no {name}")
    try:
        seconds = int(time) if isinstance(time, int) else _whole_number(time)
    except (TypeError, ValueError, OverflowError):
        raise BadLineError(f"{name} is no number") from None
    if isinstance(time, bool) or not -(2**63) <= seconds < 2**63:
        raise BadLineError(f"{name} is no number")
    return Review(reviewer, asin, seconds)


def _whole_number(value: Any) -> int:
    try:
        return int(value) if isinstance(value, str) else int(float(value))
    except ValueError:
        return int(float(value))


def _kinds(path: Path) -> set[str]:
    """What the first lines of a file look like: "reviews", "metadata", both or nothing known."""
    kinds = set()
    metadata = {"title", "brand", "category", "description", "price", "also_buy", "categories"}
    for row in _first_rows(path):
        # Reviews of 2023 have a title too.
        if {"reviewerID", "unixReviewTime", "user_id"} & row.keys():
            kinds.add("reviews")
        elif metadata & row.keys():
            kinds.add("metadata")
    return kinds


def _first_rows(path: Path) -> list[dict[str, Any]]:
    lines = _lines(path)
    first = [line for line in islice(lines, 20) if line.strip()]
    lines.close()
    if not first:
        raise UserError(f"{path} is empty, expected one JSON object a line")
    rows = []
    for line in first:
        try:
            rows.append(_parse(line, _is_literal(first[0])))
        except BadLineError:
            continue  # whether bad lines matter is decided when the file is read
    return rows
