"""Files that appear whole or not at all, and content hashes.

Everything the package writes goes through here: a file is written beside its final name, flushed to
disk and renamed, so that an interrupted or failed run (full disk, kill) never leaves half a file
and never destroys the one that was there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Names of this process's own open files; the first group or the second says which.
DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/(?:(stdout|stderr)|fd/(\d+))")
# Errors of writing that do not say to which file.
NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
# How numpy says that a file could not be written to its end.
NUMPY_CUT = re.compile(r"\d+ requested and \d+ written")


# What Git LFS leaves where a file was not fetched; its specification allows less than 1,024 bytes.
LFS_HEAD = b"version https://git-lfs"
LFS_MOST = 1024


class UserError(ValueError):
    """Something the user can mend: says what was got, what was expected and what to do."""


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing; rename it to `path` when the block ends without error.

    On any error the partial file is removed and whatever stood at `path` stays untouched. A
    symbolic link stays, and the file that it names is replaced. What is no file (a pipe, a device,
    `/dev/stdout`) is written to as it is.

    Raises:
        OSError: names `path`, whatever of the writing failed.
    """
    with naming(path):
        if not _is_plain(path):
            with _open_as_it_is(path, mode) as handle:
                yield handle
            return
        with _written_beside(Path(os.path.realpath(path)), mode) as handle:
            yield handle


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Give the name of the file to an error of writing, which has none: full disk, closed pipe."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Torch's zip writer raises a RuntimeError of its own behind the system's error.
        for cause in (error, error.__context__):
            if isinstance(cause, OSError) and cause.errno in NAMELESS and cause.filename is None:
                raise OSError(cause.errno, cause.strerror, os.fspath(path)) from error
        if isinstance(error, OSError) and NUMPY_CUT.fullmatch(str(error)):
            raise OSError(f"{path} was not written whole: {error}; is the disk full?") from None
        raise


def _is_plain(path: str | os.PathLike) -> bool:
    """Whether there is a file, or nothing yet, where `path` leads."""
    if DESCRIPTOR.fullmatch(os.fspath(path)):
        return False
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True  # what is wrong with it, opening will tell
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _open_as_it_is(path: str | os.PathLike, mode: str) -> IO[Any]:
    """A pipe or device opened, or a descriptor of this process under its name in `/dev`.

    A descriptor keeps its place: opened by name, a file behind it would be emptied.
    """
    name = DESCRIPTOR.fullmatch(os.fspath(path))
    sys.stdout.flush()  # what was printed before comes first
    encoding = None if "b" in mode else "utf-8"
    numbers = {"stdout": 1, "stderr": 2}
    target = path if name is None else os.dup(numbers.get(name[1]) or int(name[2]))
    return open(target, mode, encoding=encoding)


@contextmanager
def _written_beside(path: Path, mode: str) -> Iterator[IO[Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(partial, mode, encoding=encoding) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = None) -> None:
    """Write `value` as UTF-8 JSON, whole or not at all."""
    with atomic_write(path) as handle:
        json.dump(value, handle, ensure_ascii=False, indent=indent)
        handle.write("\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is empty, a Git LFS pointer or not JSON; the message names file and
            line. Also where a key stands twice in an object: which one is meant, nobody knows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a JSON file")
    if path.is_file() and path.stat().st_size == 0:  # a pipe has no size
        raise UserError(f"{path} is empty, expected JSON")
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: nested too deep") from None
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        refuse_pointer(path)
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice, which of the two is meant?")
    return row


def refuse_pointer(path: str | os.PathLike) -> None:
    """Refuse a file, or a folder with one, that a clone without Git LFS left in place of the data.

    Raises:
        UserError: names the file.
    """
    path = Path(path)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.is_file() or file.stat().st_size > LFS_MOST:
            continue
        with open(file, "rb") as handle:
            if handle.read(len(LFS_HEAD)) == LFS_HEAD:
                raise UserError(
                    f"{file} is a Git LFS pointer of {file.stat().st_size} bytes in place of the "
                    "file: fetch it (git lfs pull)"
                )


def sha256_of(*parts: bytes | str) -> str:
    """Hex SHA-256 over `parts`, each prefixed by its length so that borders count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
