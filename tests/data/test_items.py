"""The store of tokenised items: what it holds, when it is built anew, what it refuses."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from recformer.config import RecformerConfig
from recformer.data import items as items_module
from recformer.data.items import ARRAYS, DamagedStoreError, TokenizedItems
from recformer.files import UserError
from recformer.tokenization import RecformerTokenizer, train_tokenizer

ITEMS: list[dict[str, Any]] = [
    {"title": "red pen", "brand": "Bic"},
    {},
    {"title": "blue ink", "brand": "", "category": ["Office", "Ink"]},
    {"title": None},
    {"title": "red pen"},
]


@pytest.fixture(scope="module")
def fast() -> PreTrainedTokenizerFast:
    return train_tokenizer(["title", "brand", "category", "red pen", "blue ink"] * 5, 300)


@pytest.fixture(scope="module")
def tokenizer(fast: PreTrainedTokenizerFast) -> RecformerTokenizer:
    return RecformerTokenizer(fast, RecformerConfig(max_attr_num=3, max_attr_length=32))


@pytest.fixture
def store(tokenizer: RecformerTokenizer, tmp_path: Path) -> TokenizedItems:
    return TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path)


def contents(store: TokenizedItems) -> list[tuple[list[int], list[int]]]:
    return [
        (store.input_ids[start:end].tolist(), store.token_type_ids[start:end].tolist())
        for start, end in zip(store.offsets, store.offsets[1:])
    ]


def number_of_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets a key at every build from here on."""
    builds: list[str] = []
    build = items_module._build

    def counted(items: Any, tokenizer: Any, folder: Path, key: str) -> None:
        builds.append(key)
        build(items, tokenizer, folder, key)

    monkeypatch.setattr(items_module, "_build", counted)
    return builds


def test_store_holds_every_item_in_order(
    store: TokenizedItems, tokenizer: RecformerTokenizer
) -> None:
    assert len(store) == 5
    assert contents(store) == [tokenizer.encode_item(item) for item in ITEMS]
    lengths = [len(tokenizer.encode_item(item)[0]) for item in ITEMS]
    assert store.lengths.tolist() == lengths
    assert (lengths[1], lengths[3]) == (0, 0)
    types = (store.input_ids.dtype, store.token_type_ids.dtype, store.offsets.dtype)
    assert types == (np.uint16, np.uint8, np.int64)


def test_a_large_vocabulary_takes_wider_ids(
    store: TokenizedItems,
    tokenizer: RecformerTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for size, dtype in ((65_536, np.uint16), (65_537, np.int32)):
        monkeypatch.setattr(RecformerTokenizer, "vocab_size", size)
        wide = TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path / str(size))
        assert wide.input_ids.dtype == dtype
        assert contents(wide) == contents(store)


def test_chunks_make_no_difference(
    store: TokenizedItems,
    tokenizer: RecformerTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for size in (1, 2, 5):
        monkeypatch.setattr(items_module, "CHUNK_SIZE", size)
        chunked = TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path / str(size))
        assert chunked.key == store.key
        for name in (*(f"{name}.bin" for name in ARRAYS), "header.json"):
            assert (chunked.folder / name).read_bytes() == (store.folder / name).read_bytes()


def test_gather(store: TokenizedItems, tokenizer: RecformerTokenizer) -> None:
    wanted = [4, 1, 0, 0, 3]
    input_ids, token_type_ids, lengths = store.gather(np.array(wanted))
    encoded = [tokenizer.encode_item(ITEMS[index]) for index in wanted]
    assert input_ids.tolist() == [token for ids, _ in encoded for token in ids]
    assert token_type_ids.tolist() == [kind for _, types in encoded for kind in types]
    assert lengths.tolist() == [len(ids) for ids, _ in encoded]
    assert input_ids.dtype == token_type_ids.dtype == lengths.dtype == np.int64
    # unsigned ids must not wrap
    assert store.gather(np.array([4], dtype=np.uint8))[2].tolist() == lengths.tolist()[:1]


def test_gather_of_nothing(store: TokenizedItems) -> None:
    for nothing in ([], np.array([], dtype=np.int64), np.array([1, 3])):
        input_ids, token_type_ids, lengths = store.gather(nothing)
        assert (len(input_ids), len(token_type_ids)) == (0, 0)
        assert lengths.tolist() == [0] * len(nothing)


@pytest.mark.parametrize(
    ("item_ids", "message"),
    [
        ([0, 5], r"item id 5 is not in \[0, 5\)"),
        ([-1], "item id -1"),
        ([[0, 1]], r"expected integers of shape \(K,\)"),
        ([0.0], "float64"),
    ],
)
def test_gather_refuses(store: TokenizedItems, item_ids: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.gather(item_ids)


def test_a_store_is_built_once(
    store: TokenizedItems,
    tokenizer: RecformerTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builds = number_of_builds(monkeypatch)
    again = TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path)
    assert builds == []
    assert contents(again) == contents(store)
    assert [path.name for path in tmp_path.glob("[!.]*")] == [f"tokenized_items-{store.key}"]


def test_any_change_of_content_is_another_store(
    store: TokenizedItems, fast: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def key(items: list[dict[str, Any]], **fields: Any) -> str:
        config = RecformerConfig(**{"max_attr_num": 3, "max_attr_length": 32, **fields})
        tokenizer = RecformerTokenizer(fields.pop("fast", fast), config)
        return TokenizedItems.open_or_build(items, tokenizer, tmp_path).key

    first, *others = ITEMS
    texts = [
        [*others, first],
        ITEMS[:-1],
        [*ITEMS, {}],
        [{"title": "red pen", "brand": "Bi"}, *others],
        [{"title": "red", " penbrand": "Bic"}, *others],
        [{"brand": "Bic", "title": "red pen"}, *others],
        # the same texts with other borders between attributes and items
        [{"title": "red pen"}, {"brand": "Bic"}, *others[1:]],
        [{}, {"title": "red pen", "brand": "Bic"}, *others[1:]],
        [{"title": "red pe", "nbrand": "Bic"}, *others],
    ]
    keys = [key(items) for items in texts]
    keys += [key(ITEMS, max_attr_num=2), key(ITEMS, max_attr_length=31)]
    assert len({store.key, *keys}) == len(texts) + 3
    # what no item is made of
    assert key(ITEMS, max_item_embeddings=7, max_token_num=77) == store.key
    # one text more than max_attr_num attributes reach
    assert key([*ITEMS[:2], {**ITEMS[2], "color": "x"}, *ITEMS[3:]]) == store.key


def test_another_tokenizer_is_another_store(store: TokenizedItems, tmp_path: Path) -> None:
    other = train_tokenizer(["title", "brand", "pens"] * 5, 300)
    config = RecformerConfig(max_attr_num=3, max_attr_length=32)
    built = TokenizedItems.open_or_build(ITEMS, RecformerTokenizer(other, config), tmp_path)
    assert built.key != store.key


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "truncated":
        data = data[:-1]
    elif how == "longer":
        data += b"\0"
    elif how == "one bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "one bit"])
@pytest.mark.parametrize("name", ARRAYS)
def test_a_damaged_array_is_built_anew(
    store: TokenizedItems,
    tokenizer: RecformerTokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    how: str,
) -> None:
    expected = contents(store)
    damage(store.folder / f"{name}.bin", how)
    with caplog.at_level(logging.WARNING):
        again = TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path)
    assert f"{name}.bin" in caplog.text
    assert contents(again) == expected
    assert len(list(tmp_path.glob("[!.]*"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"key": "0" * 64},
        {"num_tokens": 1},
        {"num_items": 1},
        {"dtype": "int64"},
        {"format": "another"},
        {"crc32": {}},
        "[]",
        "{",
        "",
    ],
)
def test_a_damaged_header_is_built_anew(
    store: TokenizedItems,
    tokenizer: RecformerTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict | str | None,
) -> None:
    expected = contents(store)
    path = store.folder / "header.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    builds = number_of_builds(monkeypatch)
    again = TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path)
    assert builds == [store.key]
    assert contents(again) == expected


def test_a_store_moved_under_another_key_is_not_read(
    store: TokenizedItems, tokenizer: RecformerTokenizer, tmp_path: Path
) -> None:
    others = ITEMS[::-1]
    expected = TokenizedItems.open_or_build(others, tokenizer, tmp_path / "other")
    store.folder.rename(tmp_path / f"tokenized_items-{expected.key}")
    assert contents(TokenizedItems.open_or_build(others, tokenizer, tmp_path)) == contents(expected)


def test_a_failed_build_leaves_nothing(
    tokenizer: RecformerTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items_module, "CHUNK_SIZE", 2)
    encode_items = RecformerTokenizer.encode_items
    calls = []

    def full_disk(self: RecformerTokenizer, items: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 2:
            raise OSError("No space left on device")
        return encode_items(self, items)

    monkeypatch.setattr(RecformerTokenizer, "encode_items", full_disk)
    with pytest.raises(OSError, match="No space left"):
        TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path)
    assert list(tmp_path.glob("[!.]*")) == []


def test_wrong_items_are_named_before_anything_is_written(
    tokenizer: RecformerTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items_module, "CHUNK_SIZE", 2)
    with pytest.raises(UserError, match="item 5: the value of 'title'"):
        TokenizedItems.open_or_build([*ITEMS, {"title": {}}], tokenizer, tmp_path)
    with pytest.raises(UserError, match="catalogue is empty"):
        TokenizedItems.open_or_build([], tokenizer, tmp_path)
    assert list(tmp_path.glob("[!.]*")) == []


def test_items_without_any_text(tokenizer: RecformerTokenizer, tmp_path: Path) -> None:
    for _ in range(2):  # built, then opened
        store = TokenizedItems.open_or_build([{}, {"title": None}], tokenizer, tmp_path)
        assert len(store) == 2
        assert store.offsets.tolist() == [0, 0, 0]
        assert store.gather([1, 0])[2].tolist() == [0, 0]


def test_arrays_are_mapped_and_read_only(store: TokenizedItems) -> None:
    for array in (store.input_ids, store.token_type_ids, store.offsets):
        assert isinstance(array.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_pickle_carries_the_path_alone(
    store: TokenizedItems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.lengths.sum() > 0  # computed arrays are not carried either
    data = pickle.dumps(store)
    assert len(data) < 1000
    other = pickle.loads(data)
    assert contents(other) == contents(store)
    assert isinstance(other.input_ids.base, np.memmap)

    monkeypatch.chdir(tmp_path)
    relative = TokenizedItems(store.folder.relative_to(tmp_path))
    monkeypatch.chdir("/")
    assert contents(pickle.loads(pickle.dumps(relative))) == contents(store)

    damage(store.folder / "offsets.bin", "truncated")
    with pytest.raises(DamagedStoreError, match="offsets.bin has 47 bytes, expected 48"):
        pickle.loads(data)


def build_together(arguments: tuple) -> tuple[list, int]:
    """What a store holds, and how often this process built it."""
    fast, cache_dir, barrier = arguments
    config = RecformerConfig(max_attr_num=3, max_attr_length=32)
    tokenizer = RecformerTokenizer(fast, config)
    build, builds = items_module._build, []
    items_module._build = lambda *given: (builds.append(1), build(*given))
    try:
        barrier.wait(60)
        store = TokenizedItems.open_or_build(ITEMS * 300, tokenizer, cache_dir)
    finally:
        items_module._build = build
    return contents(store), len(builds)


def test_of_processes_that_ask_at_once_one_builds(
    fast: PreTrainedTokenizerFast, tokenizer: RecformerTokenizer, tmp_path: Path
) -> None:
    expected = [tokenizer.encode_item(item) for item in ITEMS] * 300
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(3) as pool:
        for _ in range(4):
            barrier = manager.Barrier(3)
            results = pool.map(build_together, [(fast, tmp_path, barrier)] * 3, chunksize=1)
            assert [found for found, _ in results] == [expected] * 3
            assert sum(builds for _, builds in results) == 1
            (folder,) = tmp_path.glob("tokenized_items-*")
            # the next round finds a damaged store, all at the same time
            damage(folder / "input_ids.bin", "truncated")


def test_store_replaced_under_a_reader(
    store: TokenizedItems, tokenizer: RecformerTokenizer, tmp_path: Path
) -> None:
    expected = contents(store)
    os.truncate(store.folder / "header.json", 3)
    TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path)
    assert contents(store) == expected


@pytest.mark.real_data
def test_real_catalogue(real_data: Path, tmp_path: Path) -> None:
    """The published encodings, through the store."""
    path = real_data.parent / "golden" / "tokenization.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the real data")
    golden = json.loads(path.read_text())
    config = RecformerConfig(**golden["config"])
    tokenizer = RecformerTokenizer.from_pretrained(real_data / "roberta_tokenizer", config)
    items = [entry["item"] for entry in golden["items"]]
    store = TokenizedItems.open_or_build(items, tokenizer, tmp_path)
    assert contents(store) == [tuple(entry["encoded"]) for entry in golden["items"]]
    assert store.input_ids.dtype == np.uint16


def test_what_a_dead_build_left_goes_when_the_store_is_opened(
    tokenizer: RecformerTokenizer, tmp_path: Path
) -> None:
    items = [{"title": "red lamp"}]
    TokenizedItems.open_or_build(items, tokenizer, tmp_path)
    left = tmp_path / ".tokenized_items-x.0123456789abcdef.partial"
    left.mkdir()
    (left / "input_ids.bin").write_bytes(b"half")
    old = time.time() - 7200
    os.utime(left, (old, old))
    TokenizedItems.open_or_build(items, tokenizer, tmp_path)  # built already
    assert not left.exists()
