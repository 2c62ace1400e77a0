"""The store of item vectors: what is encoded, what is taken over, and what can go wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import tracemalloc
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recformer.data import item_vectors
from recformer.data.item_vectors import content_keys, count_missing, open_or_build
from recformer.files import UserError

WORDS = ["ant", "bee", "cow", "bee", "dog", "eel", "fox"]
HIDDEN = 3


class Encoder:
    """A vector of a word is its letters' codes; remembers what it was asked."""

    def __init__(self, words: list[str], fail_after: int | None = None) -> None:
        self.words = words
        self.asked: list[list[str]] = []
        self.fail_after = fail_after

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if self.fail_after is not None and len(self.asked) == self.fail_after:
            raise KeyboardInterrupt
        self.asked.append([self.words[row] for row in rows])
        return np.array([[ord(letter) for letter in self.words[row]] for row in rows])


def keys_of(words: list[str]) -> np.ndarray:
    return content_keys(word.encode() for word in words)


def letters(words: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in word] for word in words]


def build(
    words: list[str], folder: Path, fail_after: int | None = None, model: str = "model", **how: Any
) -> tuple[np.ndarray, list[list[str]]]:
    encoder = Encoder(words, fail_after)
    vectors = open_or_build(keys_of(words), encoder, model, HIDDEN, folder, progress=False, **how)
    return vectors, encoder.asked


@pytest.fixture(autouse=True)
def blocks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_vectors, "BLOCK_SIZE", 2)


def test_equal_items_are_encoded_once(tmp_path: Path) -> None:
    vectors, asked = build(WORDS, tmp_path)
    assert asked == [["ant", "bee"], ["cow", "dog"], ["eel", "fox"]]
    assert vectors.dtype == np.float32
    assert vectors.tolist() == letters(WORDS)
    assert isinstance(vectors.base, np.memmap)


def test_a_finished_store_is_opened(tmp_path: Path) -> None:
    build(WORDS, tmp_path)
    vectors, asked = build(WORDS, tmp_path)
    assert asked == []
    assert vectors.tolist() == letters(WORDS)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 1  # blocks are gone


def test_writing_to_the_vectors_does_not_reach_the_file(tmp_path: Path) -> None:
    vectors, _ = build(WORDS, tmp_path)
    vectors[0] = 0
    assert vectors[0].tolist() == [0, 0, 0]
    assert build(WORDS, tmp_path)[0].tolist() == letters(WORDS)


def test_a_build_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(WORDS, tmp_path, fail_after=2)
    assert count_missing(keys_of(WORDS), "model", HIDDEN, tmp_path) == 2
    vectors, asked = build(WORDS, tmp_path)
    assert asked == [["eel", "fox"]]
    assert vectors.tolist() == letters(WORDS)


def killed_at_cow(folder: Path) -> None:
    def encode(rows: np.ndarray) -> np.ndarray:
        if "cow" in [WORDS[row] for row in rows]:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array(letters([WORDS[row] for row in rows]))

    open_or_build(keys_of(WORDS), encode, "model", HIDDEN, folder, progress=False)


def test_a_killed_process_loses_one_block(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_at_cow, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    vectors, asked = build(WORDS, tmp_path)
    assert asked == [["cow", "dog"], ["eel", "fox"]]
    assert vectors.tolist() == letters(WORDS)


def test_of_a_changed_catalogue_only_new_items_are_encoded(tmp_path: Path) -> None:
    before, _ = build(WORDS, tmp_path)
    changed = ["yak", "fox", "cow", "bee", "cat", "bee", "ant"]
    vectors, asked = build(changed, tmp_path)
    assert [word for block in asked for word in block] == ["yak", "cat"]
    assert vectors.tolist() == letters(changed)
    assert before.tolist() == letters(WORDS)
    # The older catalogue holds two items that the new one lacks: it stays, and opens.
    assert build(WORDS, tmp_path)[1] == []
    # Everything, in one catalogue: the others are of no use any more.
    everything = sorted({*WORDS, *changed})
    assert build(everything, tmp_path)[1] == []
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 1
    again, asked = build(WORDS, tmp_path)
    assert asked == []
    assert again.tolist() == letters(WORDS)


def test_rows_of_an_unfinished_catalogue_are_taken_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(WORDS, tmp_path, fail_after=2)
    vectors, asked = build(["fox", "dog", "ant"], tmp_path)
    assert asked == [["fox"]]
    assert vectors.tolist() == letters(["fox", "dog", "ant"])


def test_another_model_has_another_store(tmp_path: Path) -> None:
    build(WORDS, tmp_path)
    assert sum(map(len, build(WORDS, tmp_path, model="another")[1])) == 6
    assert count_missing(keys_of(WORDS), "third", HIDDEN, tmp_path) == 6
    assert count_missing(keys_of(WORDS), "model", HIDDEN + 1, tmp_path) == 6
    assert count_missing(keys_of(WORDS), "model", HIDDEN, tmp_path) == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "no keys", "text"])
def test_a_damaged_file_is_never_read(tmp_path: Path, damage: str) -> None:
    build(WORDS, tmp_path)
    (path,) = tmp_path.glob("*/*/vectors.bin")
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 4)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "zeros":  # as a crash of the machine leaves them
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    elif damage == "no keys":
        (path.parent / "keys.bin").unlink()
    else:
        path.write_text("vectors")
    vectors, asked = build(WORDS, tmp_path)
    assert sum(map(len, asked)) == 6
    assert vectors.tolist() == letters(WORDS)


@pytest.mark.parametrize("other", ["model", "catalogue"])
def test_files_under_another_name_are_not_read(tmp_path: Path, other: str) -> None:
    build(WORDS, tmp_path)
    if other == "model":
        model, words = "another", WORDS
    else:
        model, words = "model", ["hen", *WORDS[1:]]
    build(words, tmp_path / "other", model=model)
    (theirs,) = tmp_path.glob("item_vectors-*")
    (ours,) = (tmp_path / "other").iterdir()
    if other == "model":
        shutil.rmtree(ours)
        theirs.rename(ours)
    else:
        for mine, foreign in zip(sorted(ours.iterdir()), sorted(theirs.iterdir()), strict=True):
            shutil.rmtree(mine)
            foreign.replace(mine)
    vectors, asked = build(words, tmp_path / "other", model=model)
    assert sum(map(len, asked)) == 6
    assert vectors.tolist() == letters(words)


def test_processes_share_the_work(tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):  # the other process's share, up to where it would wait
        build(WORDS, tmp_path, rank=1, world=2, wait=stop)
    assert count_missing(keys_of(WORDS), "model", HIDDEN, tmp_path) == 4
    vectors, asked = build(WORDS, tmp_path, rank=0, world=2)
    assert asked == [["ant", "bee"], ["eel", "fox"]]
    assert vectors.tolist() == letters(WORDS)


def build_together(arguments: tuple) -> tuple[list, int]:
    folder, barrier = arguments
    item_vectors.BLOCK_SIZE = 2
    words = [f"{number:03}" for number in range(30)] * 2
    barrier.wait(60)
    vectors, asked = build(words, folder)
    return vectors.tolist(), sum(map(len, asked))


def test_builds_at_the_same_time_do_no_harm(tmp_path: Path) -> None:
    expected = letters([f"{number:03}" for number in range(30)] * 2)
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        results = pool.map(build_together, [(tmp_path, barrier)] * 3, chunksize=1)
    assert [vectors for vectors, _ in results] == [expected] * 3
    assert sum(count for _, count in results) >= 30


def test_blocks_removed_by_another_build_are_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another build's catalogue replaces the blocks just when ours lists them."""
    tables = item_vectors._tables
    calls = []

    def removed_once(folder: Path, hidden_size: int) -> Any:
        calls.append(folder)
        if len(calls) == 3:  # after everything was encoded
            shutil.rmtree(folder)
        return tables(folder, hidden_size)

    monkeypatch.setattr(item_vectors, "_tables", removed_once)
    assert build(WORDS, tmp_path)[0].tolist() == letters(WORDS)
    assert len(calls) > 3


def test_a_full_disk_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(item_vectors.shutil, "disk_usage", lambda _: usage(13 * 12 - 1))
    with pytest.raises(OSError, match="item vectors need .* GB in .* are free: make room"):
        build(WORDS, tmp_path)  # 6 different items and 7 in all, 12 bytes each
    monkeypatch.setattr(item_vectors.shutil, "disk_usage", lambda _: usage(13 * 12))
    assert build(WORDS, tmp_path)[0].tolist() == letters(WORDS)


def test_a_disk_that_fills_up_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = item_vectors.build_mapped, []

    def full(path: Path, key: str) -> Any:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, key)

    monkeypatch.setattr(item_vectors, "build_mapped", full)
    with pytest.raises(OSError, match="No space left on device for 2 item vectors in .*goes on"):
        build(WORDS, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(item_vectors, "BLOCK_SIZE", 2)
    vectors, asked = build(WORDS, tmp_path)
    assert asked == [["cow", "dog"], ["eel", "fox"]]
    assert vectors.tolist() == letters(WORDS)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.full((2, HIDDEN), np.nan), "not finite"),
        (np.zeros((2, HIDDEN + 1)), r"\(2, 4\), expected vectors \(2, 3\)"),
    ],
)
def test_what_an_encoder_may_not_give(tmp_path: Path, vectors: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_or_build(keys_of(WORDS), lambda _: vectors, "model", HIDDEN, tmp_path)
    assert count_missing(keys_of(WORDS), "model", HIDDEN, tmp_path) == 6


def test_no_items(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="catalogue is empty"):
        build([], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_keys_that_end_in_zero_bytes_are_told_apart() -> None:
    keys = np.frombuffer(b"a" + bytes(15) + b"a" + bytes(14) + b"b" + bytes(16), "S16")
    places = item_vectors._locate(np.unique(keys), [(keys[1:], np.zeros((2, 1), np.float32))])
    assert places[0].tolist() == [0, -1, 0]  # sorted: zeros, a, a…b
    assert places[1].tolist() == [1, 0, 0]


def test_memory_does_not_grow_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_vectors, "BLOCK_SIZE", 250)
    count, hidden = 5_000, 256
    keys = content_keys(str(number).encode() for number in range(count))
    tracemalloc.start()
    vectors = open_or_build(
        keys, lambda rows: np.repeat(rows[:, None], hidden, 1), "model", hidden, tmp_path
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (vectors[:, 0] == np.arange(count)).all()
    assert peak < count * hidden * 4 / 2  # a block is a twentieth of the table
