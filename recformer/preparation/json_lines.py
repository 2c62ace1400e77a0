"""Files of JSON lines: one object a line, or one array of objects, or a Python literal a line.

Lines go through a typed parser that steps over fields nobody asked for without building anything,
so that neither time nor memory grows much with them. Only a line that does not fit the type is
looked at again, with Python's own parser: it is then mended (a number as an asin, a time as text),
or it is a bad line, which stops the run with file and line number or is left out and counted.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from recformer.files import UserError
from recformer.preparation.bad_lines import BadLineError, BadLines
from recformer.preparation.histories import item_name
from recformer.preparation.lines import byte_lines, check_file

_Row = TypeVar("_Row", bound=msgspec.Struct)


def first_rows(path: str | os.PathLike, encoding: str | None = None) -> list[dict[str, Any]]:
    """The objects among the first lines.

    Raises:
        UserError: the file is empty or damaged, or none of its first lines is an object.
    """
    rows = look_at(Path(path), encoding)
    if not rows:
        raise UserError(f"{path}: expected one JSON object a line, found none in its first lines")
    return rows


def read_objects(
    path: str | os.PathLike,
    bad_lines: BadLines,
    once: Iterable[str | None],
    encoding: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of every line, whole: slower than a reader that knows what it looks for.

    Args:
        path: the file.
        bad_lines: what to do with lines that cannot be used.
        once: keys that must not stand twice in a line.
        encoding: see `lines.text_lines`.

    Raises:
        UserError: the file is damaged or has no usable line, or `bad_lines` refuses one.
    """
    path = Path(path)
    names = _written(once)
    literal = None
    for number, line in enumerate(_lines(path, encoding), 1):
        if not line.strip():
            continue
        literal = is_literal(line) if literal is None else literal
        try:
            row = _parse(line, literal)
            _refuse_twice(line, names)
        except BadLineError as error:
            bad_lines.add(path, number, error.reason, error.got)
            continue
        yield number, row


def _lines(path: Path, encoding: str | None, progress: bool = True) -> Iterator[bytes]:
    """Lines of a file; the entries where it is one array."""
    check_file(path)
    lines = byte_lines(path, encoding, progress)
    for line in lines:
        start = line.lstrip(b"\xef\xbb\xbf \t\r\n")
        if start[:1] == b"[":
            whole = b"".join([line.removeprefix(b"\xef\xbb\xbf"), *lines])
            try:
                yield from map(bytes, msgspec.json.decode(whole, type=list[msgspec.Raw]))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise UserError(
                    f"{path} begins with [ and is no JSON array ({error}): expected one JSON "
                    f"object a line, or one array of them"
                ) from None
            return
        yield line
        if start:
            break
    yield from lines


def _is_array(path: Path, encoding: str | None) -> bool:
    for line in byte_lines(path, encoding, progress=False):
        if start := line.lstrip(b"\xef\xbb\xbf \t\r\n"):
            return start[:1] == b"["
    return False


def read_rows(
    path: Path,
    row_type: type[_Row],
    mend: Callable[[dict[str, Any]], _Row],
    bad_lines: BadLines,
    once: Iterable[str | None],
    encoding: str | None = None,
) -> Iterator[_Row]:
    names = _written(once)
    decode = msgspec.json.Decoder(row_type).decode
    line_number = num_rows = 0
    literal: bool | None = None
    what = "line"
    for line in _lines(path, encoding):
        line_number += 1
        try:
            row = decode(line)
            for name in names:
                if line.count(name) > 1:
                    _refuse_twice(line, names)
        except BadLineError as error:
            bad_lines.add(path, line_number, error.reason, error.got, what)
            continue
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if not line.strip():
                continue
            try:
                if literal is None:
                    literal = is_literal(line) and num_rows == 0
                row = mend(_parse(line, literal))
                _refuse_twice(line, names)
            except BadLineError as error:
                if what == "line" and _is_array(path, encoding):
                    what = "entry"
                bad_lines.add(path, line_number, error.reason, error.got, what)
                continue
        num_rows += 1
        yield row
    if num_rows == 0:
        found = f"{line_number} lines, none of them usable" if line_number else "an empty file"
        raise UserError(f"{path}: expected one JSON object a line, got {found}{bad_lines.why()}")


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


def is_literal(line: bytes) -> bool:
    """Whether a file that begins with this line holds Python dicts, as Amazon 2014's metadata.

    Python 2 wrote `{u'id': u'10'}`.
    """
    start = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith((b"{'", b"{u'", b'{u"'))


def _python_literal(line: bytes) -> Any:
    try:
        tree = ast.parse(line.decode("utf-8-sig").strip(), mode="eval")
        value = ast.literal_eval(tree)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadLineError("neither valid JSON nor a Python literal") from None
    if isinstance(tree.body, ast.Dict) and len(value) < len(tree.body.keys):
        keys = [key.value for key in tree.body.keys if isinstance(key, ast.Constant)]
        raise _twice_error(next(key for key in keys if keys.count(key) > 1))
    return value


def mend_key(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None or value == "":
        raise BadLineError(f"no {name}")
    try:
        key = item_name(value)
    except ValueError:  # a number of thousands of digits
        key = None
    if key is None:
        raise BadLineError(f"{name} is no text", value)
    return key


def mend_text(value: Any) -> Any:
    """Without lone surrogates, which no file can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        try:
            return [mend_text(part) for part in value]
        except RecursionError:
            return value  # no text either, see `text_parts`
    return value


def look_at(path: Path, encoding: str | None = None) -> list[dict[str, Any]]:
    """The objects among the first 20 lines; lines that hold none are passed over.

    Raises:
        UserError: the file is empty or damaged.
    """
    lines = _lines(path, encoding, progress=False)
    first = [line for line in islice(lines, 20) if line.strip()]
    if not first:
        raise UserError(f"{path} is empty, expected one JSON object a line")
    rows = []
    for line in first:
        try:
            rows.append(_parse(line, is_literal(first[0])))
        except BadLineError:
            continue  # whether bad lines matter is decided when the file is read
    return rows


def _written(names: Iterable[str | None]) -> list[bytes]:
    """Keys as they stand in a line of JSON."""
    return [json.dumps(name, ensure_ascii=False).encode() for name in names if name is not None]


def _refuse_twice(line: bytes, names: Sequence[bytes]) -> None:
    """Refuse a line of JSON in whose object a key stands twice.

    Args:
        line: JSON, or else nothing is found.
        names: keys as `_written` gives them, of which one must be there twice, to save time.

    Raises:
        BadLineError: names the key.
    """
    if not any(line.count(name) > 1 for name in names):
        return
    found: list[str] = []

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(entries)
        keys = [key for key, _ in entries]
        # The outermost object comes last; what stands inside of one is read by nobody.
        found[:] = [key for key in row if keys.count(key) > 1] if len(keys) > len(row) else []
        return row

    try:
        json.loads(line.decode("utf-8-sig"), strict=False, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return  # a Python literal, or deeper than this parser goes
    if found:
        raise _twice_error(found[0])


def _twice_error(key: Any) -> BadLineError:
    return BadLineError(f"the key {key!r} stands twice, which of the two is meant?")
