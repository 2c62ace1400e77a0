"""Files appear whole or not at all; what is no file is written to; errors say which file."""

from __future__ import annotations

import os
import resource
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from recformer import files
from recformer.data.mapped import build_mapped
from recformer.files import UserError, atomic_folder, atomic_write, read_json


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    with atomic_write(pipe) as handle:
        handle.write("one\ntwo\n")
    reader.join(timeout=20)
    assert got == ["one\ntwo\n"]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_stays_and_its_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    with atomic_write(link) as handle:
        handle.write("new")
        handle.flush()
        assert real.read_text() == "old"
    assert link.is_symlink()
    assert real.read_text() == "new"
    with suppress(KeyError), atomic_write(link) as handle:
        handle.write("half")
        raise KeyError
    assert real.read_text() == "new"
    (tmp_path / "dangling").symlink_to(tmp_path / "later" / "file")
    with atomic_write(tmp_path / "dangling") as handle:
        handle.write("made")
    assert (tmp_path / "later" / "file").read_text() == "made"
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["there", "real", "link", "dangling", "later", "file"]
    )


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_by_name_keeps_its_place(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    print("before")
    with atomic_write(name) as handle:
        handle.write("within\n")
    print("behind")
    assert capfd.readouterr().out == "before\nwithin\nbehind\n"


def test_a_device_stays_and_a_full_one_is_named() -> None:
    with atomic_write("/dev/null") as handle:
        handle.write("gone")
    assert Path("/dev/null").is_char_device()
    with (
        pytest.raises(OSError, match="No space left on device: '/dev/full'"),
        atomic_write("/dev/full") as handle,
    ):
        handle.write("x" * 100_000)


def test_json_from_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"a": [1]}',))
    writer.start()
    assert read_json(pipe) == {"a": [1]}
    writer.join(timeout=20)
    with pytest.raises(UserError, match="is a folder, expected a JSON file"):
        read_json(tmp_path)


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB; the error is as unnamed as that of a full disk.

    In a block, not a fixture: outside of it pytest writes, perhaps to a long file.
    """
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("how", ["write", "numpy", "torch"])
def test_a_full_disk_names_the_file(tmp_path: Path, how: str) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"old")
    write = {
        "write": lambda handle: handle.write(bytes(1_000_000)),
        "numpy": lambda handle: np.save(handle, np.zeros(1_000_000)),
        "torch": lambda handle: torch.save({"a": torch.zeros(1_000_000)}, handle),
    }[how]
    with (
        pytest.raises(OSError, match=str(path)) as raised,
        small_disk(),
        atomic_write(path, "wb") as handle,
    ):
        write(handle)
    assert "too large" in str(raised.value) or "disk full" in str(raised.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("how", ["safetensors", "tokenizer", "text"])
def test_a_full_disk_names_the_folder(tmp_path: Path, how: str) -> None:
    path = tmp_path / "model"
    path.mkdir()

    def write(folder: Path) -> None:
        if how == "safetensors":
            save_file({"a": torch.zeros(1_000_000)}, folder / "model.safetensors")
        elif how == "tokenizer":
            words = {f"word{n}": n for n in range(50_000)}
            Tokenizer(WordLevel(words, "word0")).save(str(folder / "tokenizer.json"))
        else:
            (folder / "README.md").write_text("x" * 1_000_000)

    with (
        pytest.raises(OSError, match=f"File too large: '{path}'"),
        small_disk(),
        atomic_folder(path) as folder,
    ):
        write(folder)
    assert list(tmp_path.iterdir()) == [path]
    assert not list(path.iterdir())


def test_a_full_disk_names_the_store(tmp_path: Path) -> None:
    store = tmp_path / "tokenized_items"
    with (
        pytest.raises(OSError, match=f"File too large: '{store}'"),
        small_disk(),
        build_mapped(store, "key") as writer,
    ):
        writer.append("offsets", np.zeros(1_000_000), "<i8")
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_never_share_a_partial(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(path) as one, files.atomic_write(path) as other:
        one.write("one" * 9)
        other.write("other" * 9)
    assert path.read_text() == "one" * 9  # the last one to end
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    for name in (".old.1a2b.partial", ".young.1a2b.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".folder.77.partial").mkdir()
    os.utime(tmp_path / ".old.1a2b.partial", (0, 0))
    os.utime(tmp_path / ".folder.77.partial", (0, 0))
    with files.atomic_write(tmp_path / "living") as handle:
        (living,) = tmp_path.glob(".living.*.partial")
        os.utime(living, (0, 0))  # a writer that has been waiting for long
        files.remove_leftovers(tmp_path)
        handle.write("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".young.1a2b.partial", "living"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "best"
    for content in ("old", "new"):
        with files.atomic_folder(path) as folder:
            (folder / f"{content}.txt").write_text(content)
        assert [each.name for each in path.iterdir()] == [f"{content}.txt"]
    with suppress(OSError), files.atomic_folder(path) as folder:
        (folder / "newer.txt").write_text("newer")
        raise OSError("full")
    assert [each.name for each in path.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [path]


def test_checked_json_says_what_was_changed(tmp_path):
    path = tmp_path / "done.json"
    files.write_checked_json(path, {"best": 0.125, "rows": [1, 2]})
    assert files.read_checked_json(path) == {"best": 0.125, "rows": [1, 2]}
    path.write_text(path.read_text().replace("0.125", "0.126"))
    with pytest.raises(UserError, match="done.json is damaged or was edited"):
        files.read_checked_json(path)
    path.write_text('{"best": 0.5}')  # of an earlier version
    assert files.read_checked_json(path) == {"best": 0.5}
    path.write_text("[]")
    with pytest.raises(UserError, match="done.json is damaged: it holds list"):
        files.read_checked_json(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_of_a_zip_file_is_found_as_zipfile_finds_it(tmp_path, compressed):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.arange(60.0), "step": 7}, path)
    if compressed:
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in records.items():
                archive.writestr(name, content)
    files.check_torch_file(path)
    sound = path.read_bytes()
    found = 0
    for place in range(0, len(sound), 3):
        raw = bytearray(sound)
        raw[place] ^= 1 << place % 8
        path.write_bytes(raw)
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip() is not None
        except Exception:
            bad = True
        if bad:
            found += 1
            with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
                files.check_torch_file(path)
    assert found > len(sound) / 3 / 8


def test_a_key_that_stands_twice_in_yaml_is_refused(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  a: 3\nlist: [{a: 1}, {a: 2}]")
    assert files.read_yaml(path) == {
        "base": {"a": 1, "b": 2}, "other": {"a": 3, "b": 2}, "list": [{"a": 1}, {"a": 2}],
    }  # fmt: skip
    path.write_text("search:\n  lr: 1\n  size: 2\n  lr: 3")
    with pytest.raises(UserError, match=r"no YAML: the key 'lr' stands twice, .*\? \(line 4\)"):
        files.read_yaml(path)
