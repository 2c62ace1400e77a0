"""Files that appear whole or not at all, checksums and content hashes.

Everything the package writes goes through here: a file is written beside its final name, flushed to
disk and renamed, so that an interrupted or failed run (full disk, kill) never leaves half a file
and never destroys the one that was there. What lies beside has a random name and is locked while
it is written; `remove_leftovers` takes away what dead processes left.

What a run reads back of its own is verified: JSON by a checksum in it (`write_checked_json`), torch
files by those of their zip records (`check_torch_file`), ranks by those of Parquet's pages, mapped
stores by their headers (`recformer.data.mapped`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from isal import isal_zlib

# Names of this process's own open files; the first group or the second says which.
DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/(?:(stdout|stderr)|fd/(\d+))")
# Errors of writing that do not say to which file.
NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
# How numpy says that a file could not be written to its end.
NUMPY_CUT = re.compile(r"\d+ requested and \d+ written")
# How safetensors, tokenizers and Polars, which are written in Rust, end errors of the system.
RUST_ERROR = re.compile(r"\(os error (\d+)\)")

PARTIAL = ".partial"

# Seconds that what lies beside must be untouched before it counts as a dead process's, where
# nobody holds its lock: a network drive may not pass locks on.
DEAD_AFTER = 3600

LOCAL_HEADER = 30  # bytes before each record of a zip file, its name left out
KNOWN_FLAGS = 0x808  # of a record: sizes behind it, name in UTF-8

CHECKSUM = "crc32"  # last key of a checked JSON file
CHECKSUMS_FILE = "checksums.json"  # in a folder of weights


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
        if not is_plain(path):
            with _open_as_it_is(path, mode) as handle:
                yield handle
            return
        with _written_beside(Path(os.path.realpath(path)), mode) as handle:
            yield handle


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Give the name of the file or folder to an error of writing, which has none: full disk, …

    Raises:
        OSError: in place of one without a name, also where a library has its own class for it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Torch's zip writer raises a RuntimeError of its own behind the system's error.
        for cause in (error, error.__context__):
            if isinstance(cause, OSError) and cause.errno in NAMELESS and cause.filename is None:
                raise OSError(cause.errno, cause.strerror, os.fspath(path)) from error
        if isinstance(error, OSError) and NUMPY_CUT.fullmatch(str(error)):
            raise OSError(f"{path} was not written whole: {error}; is the disk full?") from None
        number = RUST_ERROR.search(str(error))
        if number is not None and int(number[1]) in NAMELESS:
            code = int(number[1])
            raise OSError(code, os.strerror(code), os.fspath(path)) from error
        raise


def is_plain(path: str | os.PathLike) -> bool:
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
    partial = beside(path)
    encoding = None if "b" in mode else "utf-8"
    try:
        # "x": a name that another process has would be an error, never a shared file.
        with open(partial, mode.replace("w", "x"), encoding=encoding) as handle:
            lock(handle.fileno())
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside `path` to be filled; it takes the place of `path` when the block ends.

    On any error the new folder is removed and what stood at `path` stays. A kill between the two
    renames leaves nothing at `path`, never files of both.

    Raises:
        OSError: names `path`, whatever of the writing failed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = beside(path)
    with naming(path), partial_folder(path) as partial:
        yield partial
        for each in partial.rglob("*"):
            if each.is_file():
                with open(each, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new, locked folder beside `path`, removed at the end if it is still there.

    Who writes there for long touches it now and then, see `DEAD_AFTER`.
    """
    partial = beside(path)
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        lock(descriptor)
        yield partial
    finally:
        os.close(descriptor)
        shutil.rmtree(partial, ignore_errors=True)


def beside(path: Path) -> Path:
    """A hidden name of its own in the folder of `path`; nobody else has it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")


def remove_leftovers(folder: str | os.PathLike, deep: bool = False) -> None:
    """Remove what dead processes left half-written in a folder.

    Args:
        folder: that may not exist.
        deep: look into folders within it, too.
    """
    pattern = f".*{PARTIAL}"
    for path in Path(folder).rglob(pattern) if deep else Path(folder).glob(pattern):
        with suppress(OSError):  # gone by now, or not ours to remove
            if _is_dead(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_dead(path: Path) -> bool:
    if time.time() - path.stat().st_mtime < DEAD_AFTER:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return lock(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Take the lock of a file or folder until it is closed; False where somebody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks on this file system: age alone decides
    return True


T = TypeVar("T")
LOCK = ".lock"
_within = threading.local()  # folders that a thread is alone in
os.register_at_fork(after_in_child=lambda: vars(_within).clear())


@contextmanager
def alone(folder: str | os.PathLike) -> Iterator[None]:
    """Wait until nobody else is within such a block for this folder, and keep others waiting.

    A thread that is within one may enter another. The folder gets an empty file `.lock` (NFS locks
    what may be written alone). Where none can be made or locked, nobody waits.
    """
    name, held = os.path.realpath(folder), vars(_within).setdefault("folders", set())
    if name in held:
        yield
        return
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    held.add(name)
    try:
        yield
    finally:
        held.discard(name)
        if descriptor is not None:
            with suppress(OSError):  # also for a child that was forked within
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def found_or_made(
    folder: str | os.PathLike, find: Callable[[], T | None], make: Callable[[], T]
) -> T:
    """What is kept in a folder, or is made there by one of the processes that ask for it.

    Args:
        folder: that exists; see `alone`.
        find: gives what is kept there, or None.
        make: makes it; asked for by one at a time, and only where there is none.
    """
    found = find()
    if found is not None:
        return found
    with alone(folder):
        found = find()  # by whom we waited for
        return make() if found is None else found


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
            return json.load(handle, object_pairs_hook=without_repeats)
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: nested too deep") from None
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        refuse_pointer(path)
        raise UserError(f"{path} is not valid JSON: {error}") from error


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; ValueError where a key stands twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice, which of the two is meant?")
    return row


def yaml_file(name_or_file: str, folder: Path, what: str, flag: str = "") -> Path:
    """A YAML file, given (by `flag`) by its path or as the name of one of those in `folder`.

    Raises:
        FileNotFoundError: neither; names the `what`s that there are.
    """
    path = Path(name_or_file)
    if not path.is_file():
        path = folder / f"{name_or_file.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        asked = f"{flag} {name_or_file}".strip()
        raise FileNotFoundError(f"{asked}: no such {what}; there are {known}, or give a file")
    return path


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is not YAML, or a key stands twice in a mapping.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in names:
                    problem = f"the key {key.value!r} stands twice, which of the two is meant?"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                names.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except RecursionError:
        raise UserError(f"{path} is no YAML: nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise UserError(f"{path} is no YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, a date of day 99
        raise UserError(f"{path} is no YAML: {error}") from error


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


def write_checked_json(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON with a checksum of it under `CHECKSUM`."""
    write_json(path, value | {CHECKSUM: _checksum(value)}, indent=1)


def read_checked_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `write_checked_json` wrote, without the checksum; files that have none pass.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is damaged, or no JSON object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {type(value).__name__}, expected an object")
    expected = value.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(value):
        raise UserError(f"{path} is damaged or was edited: its checksum is another")
    return value


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def check_torch_file(path: str | os.PathLike) -> None:
    """Read a file of `torch.save`, or a folder of them, and compare the checksums of its records.

    torch writes them and does not read them.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    for file in sorted(path.rglob("*.pt")) if path.is_dir() else [path]:
        try:
            bad = _bad_record(file)
        except Exception as error:  # zipfile and its decompressors have many
            if isinstance(error, OSError) and error.filename is not None:
                raise  # not allowed to read it, say
            raise UserError(f"{file} is damaged: {error or type(error).__name__}") from error
        if bad is not None:
            raise UserError(f"{file} is damaged: {bad} has another checksum")


def _bad_record(file: Path) -> str | None:
    """Name of the first record of a zip file whose content is not what its checksum says.

    As `ZipFile.testzip`, at several times its speed: torch stores records uncompressed.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            return archive.testzip()
    content = np.memmap(file, np.uint8, mode="r")
    for record in records:
        # A record's own header ends with the lengths of its name and of what is behind that.
        head = content[record.header_offset :][:LOCAL_HEADER].tobytes()
        name, extra = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        start = record.header_offset + LOCAL_HEADER
        own_name = content[start : start + name].tobytes()
        held = content[start + name + extra :][: record.file_size]
        sound = head[:4] == b"PK\x03\x04" and own_name == record.orig_filename.encode()
        sound = sound and not record.flag_bits & ~KNOWN_FLAGS
        sound = sound and len(held) == record.file_size == record.compress_size
        if not sound or isal_zlib.crc32(held) != record.CRC:
            return record.filename
    return None


def write_checksums(folder: Path) -> None:
    """Write CRC-32 of every file of a folder beside them, for `check_folder`.

    But for Markdown, which people edit and no program reads.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".md"]
    sums = {path.name: file_crc32(path) for path in files}
    write_checked_json(folder / CHECKSUMS_FILE, sums)


def check_folder(folder: str | os.PathLike, *names: str) -> None:
    """Compare files of a folder with its checksums; a folder that has none passes.

    Args:
        folder: of weights.
        names: of the files that will be read; none: all that have a checksum.

    Raises:
        UserError: one is damaged, or was replaced.
    """
    path = Path(folder) / CHECKSUMS_FILE
    if not path.is_file():
        return
    sums = read_checked_json(path)
    for name in names or sums:
        file = Path(folder) / name
        if name in sums and file.is_file() and file_crc32(file) != sums[name]:
            raise UserError(
                f"{file} is damaged, or was replaced: its checksum is another than {path} says; "
                f"where the change was meant, remove {CHECKSUMS_FILE}"
            )


def file_crc32(path: str | os.PathLike) -> int:
    """CRC-32 of a file's content."""
    crc32 = 0
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            crc32 = isal_zlib.crc32(block, crc32)
    return crc32


def sha256_of(*parts: bytes | str | np.ndarray) -> str:
    """Hex SHA-256 over `parts`, each prefixed by its length so that borders count; an array counts
    as its bytes, of which no copy is made."""
    digest = hashlib.sha256()
    for part in parts:
        data: Any = part
        if isinstance(part, str):
            data = part.encode("utf-8", "surrogatepass")
        elif isinstance(part, np.ndarray):
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
