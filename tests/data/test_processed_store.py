"""Large processed folders in mapped files: the same content, keyed by it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recformer import RecformerConfig
from recformer.data import items as items_module
from recformer.data import processed, processed_store
from recformer.data.items import TokenizedItems
from recformer.data.processed import ProcessedFolder, Sequences, join_splits, write_processed
from recformer.data.texts import ItemTexts, Texts, attribute_counts
from recformer.tokenization import RecformerTokenizer, train_tokenizer

FILES = {
    "train.json": {"0": [0, 1], "7": [2], "2": [1, 1]},
    "val.json": {"0": [2], "7": [3]},
    "test.json": {"0": [3], "7": [0], "3": [2, 0, 1]},
    "smap.json": {"B0": 0, "B\ud8001": 1, "ßB2": 2, "B3": 3},
    "meta_data.json": {
        "B0": {"title": "zero “0”", "brand": "", "year": 1999},
        "B3": {"brand": "d\ud83d", "title": "three"},
        "B9": {"title": "nobody met it"},
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in FILES.items():
        (tmp_path / name).write_text(json.dumps(value))
    monkeypatch.setattr(processed_store, "LARGE", 0)
    return tmp_path


def content(data: ProcessedFolder) -> dict[str, object]:
    return {
        **{
            f"{name} {kind}": getattr(getattr(data, name), kind).tolist()
            for name in ("train", "val", "test")
            for kind in ("offsets", "items")
        },
        "numbers": (data.num_users, data.num_items, data.num_without_metadata, data.split_hash),
        "items": list(data.items),
        "asins": list(data.asins),
    }


def test_mapped_folder_says_what_its_json_says_and_is_not_parsed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processed_store, "LARGE", 1 << 20)
    plain = ProcessedFolder.load(folder)
    assert not (folder / "mapped").exists()
    assert isinstance(plain.items, list)

    monkeypatch.setattr(processed_store, "LARGE", 0)
    first = ProcessedFolder.load(folder)
    for name in ("read_item_map", "read_split", "read_items"):
        monkeypatch.delattr(processed, name)
    second = ProcessedFolder.load(folder)
    assert content(plain) == content(first) == content(second)
    assert content(plain)["numbers"][:3] == (8, 4, 2)  # type: ignore[index]
    assert plain.items[0] == {"title": "zero “0”", "brand": "", "year": "1999"}
    assert [type(each) for each in (second.items, second.asins)] == [ItemTexts, Texts]
    assert plain.asins == second.asins
    assert plain.items == second.items
    for split in ("val", "test"):
        ours, theirs = plain.eval_examples(split), second.eval_examples(split)
        assert ours.targets.tolist() == theirs.targets.tolist()
        assert ours.histories.items.tolist() == theirs.histories.items.tolist()
        assert ours.starts is not None
        assert theirs.starts is not None
        assert ours.starts.tolist() == theirs.starts.tolist()


def test_other_content_of_the_same_size_and_time_is_read_anew(folder: Path) -> None:
    ProcessedFolder.load(folder)
    file = folder / "train.json"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text(file.read_text().replace("[2]", "[3]"))
    os.utime(file, ns=times)
    assert ProcessedFolder.load(folder).train[7].tolist() == [3]


def test_damaged_copy_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = content(ProcessedFolder.load(folder))
    (store,) = (folder / "mapped").glob("processed-*")
    damaged = bytearray((store / "value_data.bin").read_bytes())
    damaged[0] ^= 1
    (store / "value_data.bin").write_bytes(damaged)
    assert content(ProcessedFolder.load(folder)) == before
    assert "value_data.bin has another checksum: reading the JSON files again" in caplog.text
    assert content(ProcessedFolder.load(folder)) == before


def test_folder_that_is_written_anew_loses_its_copy(folder: Path) -> None:
    ProcessedFolder.load(folder)
    one = Sequences.from_lists([[0, 0, 0]])
    write_processed(
        folder, train=one, val=one, test=one, user_names=["u"], asins=["a"], meta={}, dataset={}
    )
    assert not list((folder / "mapped").glob("processed-*"))
    assert ProcessedFolder.load(folder).asins == ["a"]


def test_read_only_folder_is_read_without_a_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(processed_store.Path, "mkdir", refused)
    assert ProcessedFolder.load(folder).num_items == 4
    assert not (folder / "mapped").exists()


def test_a_full_disk_leaves_what_was_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(processed_store, "write_content", full)
    assert ProcessedFolder.load(folder).num_items == 4
    assert "is not kept mapped" in caplog.text
    assert "No space left" in caplog.text
    assert not list((folder / "mapped").glob("processed-*"))


def test_files_exchanged_while_they_are_read_are_kept_under_no_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = processed._read

    def slowly(*given: object) -> object:
        found = read(*given)
        train = folder / "train.json"
        train.write_text(train.read_text().replace("[2]", "[3]"))
        return found

    monkeypatch.setattr(processed, "_read", slowly)
    ProcessedFolder.load(folder)
    assert not list((folder / "mapped").glob("processed-*"))
    monkeypatch.setattr(processed, "_read", read)
    assert ProcessedFolder.load(folder).train[7].tolist() == [3]


def load_together(arguments: tuple) -> int:
    """How often this process read the JSON."""
    folder, barrier = arguments
    read, reads = processed._read, []
    processed._read = lambda *given: (reads.append(1), read(*given))[1]
    try:
        barrier.wait(60)
        assert ProcessedFolder.load(folder).num_items == 4
    finally:
        processed._read = read
    return len(reads)


def test_of_processes_that_open_at_once_one_reads_the_json(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        reads = pool.map(load_together, [(folder, barrier)] * 3, chunksize=1)
    assert sum(reads) == 1


def test_tokens_of_mapped_items_have_the_key_of_those_in_lists_and_it_is_noted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = train_tokenizer(["title", "brand", "zero three"] * 5, 300)
    tokenizer = RecformerTokenizer(fast, RecformerConfig(max_attr_num=3, max_attr_length=32))
    texts = json.loads((folder / "meta_data.json").read_text().replace("\\ud83d", ""))
    (folder / "meta_data.json").write_text(json.dumps(texts))
    data = ProcessedFolder.load(folder)
    listed = TokenizedItems.open_or_build(list(data.items), tokenizer, folder / "tokenized")
    mapped = TokenizedItems.open_or_build(data.items, tokenizer, folder / "tokenized")
    assert listed.key == mapped.key
    monkeypatch.delattr(items_module, "_content_key")
    again = TokenizedItems.open_or_build(data.items, tokenizer, folder / "tokenized")
    assert again.key == mapped.key
    assert data.items.digest() != data.items[1:].digest()  # type: ignore[attr-defined]


TEXT = st.text(st.characters(exclude_categories=()), max_size=3)


@given(st.lists(st.dictionaries(TEXT, TEXT, max_size=3), max_size=5), st.data())
def test_texts_are_lists_of_texts(items: list[dict[str, str]], data: st.DataObject) -> None:
    laid = ItemTexts.of(items)
    assert list(laid) == items
    assert laid == items
    assert [list(item) for item in laid] == [list(item) for item in items]  # and their order
    assert attribute_counts(laid).tolist() == [len(item) for item in items]
    names = [name for item in items for name in item]
    assert list(Texts.of(names)) == names
    cut = data.draw(st.slices(len(items)))
    assert list(laid[cut]) == items[cut]
    assert list(Texts.of(names)[cut]) == names[cut]
    if items:
        place = data.draw(st.integers(-len(items), len(items) - 1))
        assert laid[place] == items[place]
    with pytest.raises(IndexError):
        laid[len(items)]
    assert (laid == "text") is False


@given(st.lists(st.tuples(*[st.lists(st.integers(0, 9), max_size=3)] * 3), max_size=5))
def test_joined_splits_are_each_users_parts_in_order(users: list[tuple[list[int], ...]]) -> None:
    parts = [Sequences.from_lists([user[part] for user in users]) for part in range(3)]
    joined = join_splits(*parts)
    assert [joined[row].tolist() for row in range(len(users))] == [
        [item for part in user for item in part] for user in users
    ]
    assert joined.items.dtype == np.int32
