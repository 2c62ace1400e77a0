"""Lines of text files, gzipped or not, in any encoding; a file of another kind is refused by name.

Every reader of raw text opens its file here. A path is the name of one file, never a pattern.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import shutil
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from isal import igzip, igzip_lib
from tqdm import tqdm

from recformer.files import UserError, naming

_ISAL_ERROR: Any = igzip_lib.IsalError  # a class, which its stub declares as an instance
_GZIP_ERRORS: tuple[type[Exception], ...] = (EOFError, BadGzipFile, zlib.error, _ISAL_ERROR)
_LINES_A_PROGRESS_STEP = 256
_LOOK_AT = 1 << 16  # bytes that tell encoding and line ends
_GZIP = b"\x1f\x8b"

# How files begin that hold no text, and what to do with them.
_NO_TEXT: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or a spreadsheet): unpack it, or save it as CSV"),
    (b"BZh", "packed by bzip2: unpack it (bunzip2), or pack it by gzip"),
    (b"\xfd7zXZ", "packed by xz: unpack it (unxz), or pack it by gzip"),
    (b"\x28\xb5\x2f\xfd", "packed by zstandard: unpack it (unzstd), or pack it by gzip"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"SQLite format 3", "a SQLite database: export its tables as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Excel file: save it as CSV"),
    (b"\x89HDF", "an HDF5 file: write its tables as Parquet or CSV"),
    *(
        (bytes([0x80, protocol]), "a Python pickle, which could run any program: write Parquet")
        for protocol in (2, 3, 4, 5)
    ),
    (b"\x93NUMPY", "a NumPy array: write its columns as Parquet or CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it (git lfs pull)"),
    (b"<!doctype html", "a web page: the address answered with a page instead of the file"),
    (b"<html", "a web page: the address answered with a page instead of the file"),
)
# Bytes that are not in the encoding, as Python's `surrogateescape` keeps them.
_ESCAPED = re.compile("[\udc80-\udcff]")


def escaped(line: str) -> bool:
    """Whether a line of `text_lines` holds bytes that are not in the file's encoding."""
    return not line.isascii() and _ESCAPED.search(line) is not None


def check_encoding(name: str) -> None:
    """Refuse an encoding that Python does not know.

    Raises:
        UserError: no such encoding, or one that is not of text.
    """
    try:
        if codecs.lookup(name)._is_text_encoding:
            return
    except LookupError:
        pass
    raise UserError(f"got --encoding {name}, expected a text encoding: utf-8, latin-1, cp932, …")


def other_encoding(path: str | os.PathLike, name: str | None) -> str | None:
    """The encoding that was named, for a file that is not UTF-8 by itself; None: it is.

    Of two files that are read together one is often older than the other.
    """
    if name is None:
        return None
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        with _unpacked(Path(path)) as (_, raw):
            while chunk := raw.read(1 << 20):
                # Zeros are of a wide encoding, escapes of one that shifts (ISO-2022-JP).
                if b"\0" in chunk or b"\x1b" in chunk:
                    return name
                decode(chunk)
            decode(b"", final=True)
    except UnicodeDecodeError:
        return name
    return None


@contextmanager
def rereadable(path: str | os.PathLike) -> Iterator[Path]:
    """A file itself, or a copy of what a pipe holds, for as long as the block runs.

    What a file is, its first lines tell, so a raw file is read more than once.

    Raises:
        UserError: of the block, with the pipe's name in place of the copy's.
    """
    path = Path(path)
    if not (path.is_fifo() or path.is_socket()):
        yield path
        return
    with TemporaryDirectory(prefix="recformer_") as folder:
        copy = Path(folder) / path.name
        with naming(copy), open(path, "rb") as pipe, open(copy, "wb") as handle:
            shutil.copyfileobj(pipe, handle)
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(path))) from error


def check_file(path: str | os.PathLike) -> None:
    """Refuse a file that is empty or holds no text, by what it is.

    Raises:
        UserError: the file is empty, damaged, an archive, a database, a web page, …
    """
    path = Path(path)
    start = _start(path)
    if not start.strip():
        raise UserError(f"{path} is empty, expected interactions or items")
    for magic, what in _NO_TEXT:
        if start.lower().startswith(magic) if magic[:1] == b"<" else start.startswith(magic):
            raise UserError(f"{path} is {what}")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it")


def text_lines(
    path: str | os.PathLike, encoding: str | None = None, progress: bool = True
) -> Generator[str, None, None]:
    """Lines of a text file with their ends, which are LF, CR LF or, in old files, CR.

    Args:
        path: gzipped or plain.
        encoding: Python's name; None: UTF-8. A byte order mark in the file goes before it.
        progress: show a bar over the size of the file where somebody watches.

    Yields:
        Lines; bytes that are not in the encoding are lone surrogates, see `escaped`.

    Raises:
        UserError: the file is damaged, or not in a wide encoding (UTF-16) at all.
    """
    path = Path(path)
    start = _start(path)
    name = _encoding(path, start, encoding)
    look = start.decode(name, errors="replace")
    line_end = "\r" if "\r" in look and "\n" not in look else "\n"
    with _unpacked(path) as (packed, raw):
        lines = io.TextIOWrapper(raw, name, errors="surrogateescape", newline=line_end)
        try:
            yield from _with_bar(path, lines, packed, progress)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not {name} ({error.reason}): name its encoding with --encoding"
            ) from error


def byte_lines(
    path: str | os.PathLike, encoding: str | None = None, progress: bool = True
) -> Generator[bytes, None, None]:
    """Lines as UTF-8, see `text_lines`; without decoding where the file is UTF-8 already."""
    path = Path(path)
    start = _start(path)
    if _encoding(path, start, encoding) == "utf-8-sig" and (b"\n" in start or b"\r" not in start):
        with _unpacked(path) as (packed, raw):
            yield from _with_bar(path, raw, packed, progress)
    else:
        for line in text_lines(path, encoding, progress):
            yield line.encode("utf-8", "surrogateescape")


def first_lines(path: str | os.PathLike, number: int, encoding: str | None = None) -> list[str]:
    """Up to so many of the first lines that are not blank, without their ends.

    Raises:
        UserError: the file is empty, damaged or holds no text.
    """
    check_file(path)
    lines = text_lines(path, encoding, progress=False)
    found = list(islice((line.strip("\r\n") for line in lines if line.strip()), number))
    lines.close()
    if not found:
        raise UserError(f"{path} is empty, expected interactions or items")
    return found


def byte_blocks(path: str | os.PathLike) -> Generator[bytes, None, None]:
    """Unpacked content of a file, a few megabytes at once.

    Raises:
        UserError: the file is damaged.
    """
    with _unpacked(Path(path)) as (_, raw):
        while block := raw.read(1 << 22):
            yield block


def _start(path: Path) -> bytes:
    """The first bytes of a file's unpacked content."""
    with _unpacked(path) as (_, raw):
        return raw.read(_LOOK_AT)


def _encoding(path: Path, start: bytes, named: str | None) -> str:
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if named is None or codecs.lookup(named).name == "utf-8":
        if b"\0" in start[:200]:
            raise UserError(
                f"{path} has zero bytes where text was expected: name its encoding with --encoding "
                f"(utf-16-le, utf-16-be), if it is text at all"
            )
        return "utf-8-sig"
    return named


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[IO[bytes], Any]]:
    """The file on the disk, and a reader of its unpacked content."""
    with open(path, "rb") as packed:
        is_gzip = packed.read(2) == _GZIP
        packed.seek(0)
        try:
            with igzip.IGzipFile(fileobj=packed) if is_gzip else packed as raw:
                yield packed, raw
        except _GZIP_ERRORS as error:
            raise UserError(
                f"{path} is cut off or damaged ({error}): expected a whole gzip file, fetch it "
                f"again"
            ) from error


def _with_bar(path: Path, lines: Iterator[Any], packed: IO[bytes], progress: bool) -> Iterator[Any]:
    with tqdm(
        total=path.stat().st_size,
        desc=path.name,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: no bar where nobody watches: a file or a pipe
        leave=False,
    ) as bar:
        while step := list(islice(lines, _LINES_A_PROGRESS_STEP)):
            yield from step
            bar.update(packed.tell() - bar.n)
