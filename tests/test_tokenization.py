"""The sentence of an item and of a sequence, by hand and golden, with tokenizers of any origin."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recformer.commands.tokenizer import main
from recformer.config import RecformerConfig
from recformer.tokenization import RecformerTokenizer, item_texts, ragged_indices, train_tokenizer

KEYS = [
    "input_ids",
    "item_position_ids",
    "token_type_ids",
    "attention_mask",
    "global_attention_mask",
]
SHAPE = {
    "max_attr_num": 3,
    "max_attr_length": 4,
    "max_item_embeddings": 4,
    "max_token_num": 12,
}
# Every word is a token, with and without the space before it.
WORDS = ["title", "brand", "color", "red", "blue", "pen", "ink", "Bic"]
# Ids: 0 to 4 special, then the words in this order, then " word" in this order.
TITLE, BRAND, COLOR, RED, BLUE, PEN, INK, BIC = range(5, 13)
SPACE = len(WORDS)  # id of " word" - id of "word"


def byte_level_folder(folder: Path) -> Path:
    """vocab.json and merges.txt alone, as RoBERTa ships them: whole words by hand-made merges."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS, *(f"Ġ{word}" for word in WORDS)]
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            tokens.append(word[: end + 1])
    merges += [("Ġ", word) for word in WORDS]
    tokens += [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ"]
    unique = list(dict.fromkeys(tokens))
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(unique)}))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in dict.fromkeys(merges))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


def word_piece_tokens() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, "title", "red", "pen", *letters, *(f"##{x}" for x in letters), "[", "]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer") / "byte_level")


@pytest.fixture(scope="module")
def hand(folder: Path) -> RecformerTokenizer:
    """A tokenizer whose ids can be written down by hand."""
    return RecformerTokenizer.from_pretrained(folder, RecformerConfig(**SHAPE))


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(["red pen", "blue pen", "title", "brand"] * 5, 300)


# An item's sentence


def test_item_is_names_and_values_without_leading_space(hand: RecformerTokenizer) -> None:
    ids, types = hand.encode_item({"title": "red pen", "brand": "Bic"})
    assert ids == [TITLE, RED, PEN + SPACE, BRAND, BIC]
    assert types == [1, 2, 2, 1, 2]


def test_name_and_value_are_cut_together(hand: RecformerTokenizer) -> None:
    ids, types = hand.encode_item({"title": "red blue pen ink", "blue red red red red": "ink"})
    first = [TITLE, RED, BLUE + SPACE, PEN + SPACE]
    assert ids == [*first, BLUE, RED + SPACE, RED + SPACE, RED + SPACE]
    assert types == [1, 2, 2, 2, 1, 1, 1, 1]


def test_a_text_of_millions_of_words_is_cut_before_it_is_tokenised(
    hand: RecformerTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At four tokens an attribute the first 32 words are enough."""
    sizes, tokenize = [], RecformerTokenizer._tokenize

    def counted(self: RecformerTokenizer, texts: list[str]) -> tuple:
        sizes.extend(len(text.split()) for text in texts)
        return tokenize(self, texts)

    monkeypatch.setattr(RecformerTokenizer, "_tokenize", counted)
    long = " red  blue\n" + "pen ink " * 2_500_000
    ids, types = hand.encode_item({"title": long, "brand": "Bic"})
    short = hand.encode_item({"title": " red  blue\n" + "pen ink " * 20, "brand": "Bic"})
    assert (ids, types) == short
    assert max(sizes[:4]) == 32
    word = "red" * 5_000  # and the first characters of a word
    assert hand.encode_item({"title": word})[0] == [TITLE, RED, RED, RED]


def test_a_word_or_a_gap_of_millions_of_characters_is_cut_before_it_is_tokenised(
    hand: RecformerTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, tokenize = [], RecformerTokenizer._tokenize

    def counted(self: RecformerTokenizer, texts: list[str]) -> tuple:
        sizes.extend(map(len, texts))
        return tokenize(self, texts)

    monkeypatch.setattr(RecformerTokenizer, "_tokenize", counted)
    assert hand.encode_item({"title": "red" * 2_000_000})[0] == [TITLE, RED, RED, RED]
    # A tokenizer may leave characters out: what stands behind them is still read.
    gaps = ["red" + " " * number + "blue" for number in (5_000_000, 9_000)]
    assert hand.encode_item({"title": gaps[0]}) == hand.encode_item({"title": gaps[1]})
    assert max(sizes) < 11_000


@pytest.mark.parametrize("text", ["絵本と文房具" * 3_000, "pen-" * 5_000, "a" * 20_000])
def test_a_long_word_that_is_cut_has_the_same_first_tokens(text: str, tmp_path: Path) -> None:
    config = RecformerConfig(max_attr_length=32)
    tokenizer = train_tokenizer([text[:30], "red pens and paper"] * 9, 400, tmp_path)
    cut = RecformerTokenizer.from_pretrained(str(tmp_path), config)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    name = tokenizer("title", add_special_tokens=False)["input_ids"]
    assert cut.encode_item({"title": text})[0] == (name + whole)[:32]
    assert len(text) > cut._most_characters


def test_attributes_beyond_the_third_are_left_out(hand: RecformerTokenizer) -> None:
    item = {"title": "red", "brand": "Bic", "color": "blue", "ink": "ink"}
    assert hand.encode_item(item)[0] == [TITLE, RED, BRAND, BIC, COLOR, BLUE]


def test_empty_value_is_its_name_and_absent_value_nothing(hand: RecformerTokenizer) -> None:
    assert hand.encode_item({"title": "", "brand": "Bic"}) == ([TITLE, BRAND, BIC], [1, 1, 2])
    for absent in (None, float("nan"), np.float32("nan")):
        item = {"title": absent, "brand": "Bic", "color": "red", "pen": "ink"}
        # what is absent takes no place among the first three
        assert hand.encode_item(item)[0] == [BRAND, BIC, COLOR, RED, PEN, INK]
    assert hand.encode_item({}) == ([], [])
    assert hand.encode_item({"title": None}) == ([], [])


def test_lists_and_numbers_become_text() -> None:
    item = {"a": ["x", ["y", None], 2], "b": 3, "c": 1.5, "d": [], "e": True, "f": np.int64(7)}
    texts, counts = item_texts([item, {}, {"g": ("p", "q")}])
    values = ["a", "x y 2", "b", "3", "c", "1.5", "d", "", "e", "True", "f", "7", "g", "p q"]
    assert texts == values
    assert counts == [6, 0, 1]


def test_many_items_at_once_are_the_items_one_by_one(hand: RecformerTokenizer) -> None:
    items = [{"title": "red pen"}, {}, {"title": "red pen", "brand": "Bic"}, {"brand": ""}, {}]
    input_ids, token_type_ids, offsets = hand.encode_items(items)
    assert (input_ids.dtype, token_type_ids.dtype, offsets.dtype) == (np.int32, np.uint8, np.int64)
    assert offsets.tolist() == [0, 3, 3, 8, 9, 9]
    pen = [TITLE, RED, PEN + SPACE]
    assert input_ids.tolist() == [*pen, *pen, BRAND, BIC, BRAND]
    assert token_type_ids.tolist() == [1, 2, 2, 1, 2, 2, 1, 2, 1]


def test_no_items_have_no_tokens(hand: RecformerTokenizer) -> None:
    input_ids, token_type_ids, offsets = hand.encode_items([])
    assert (len(input_ids), len(token_type_ids), offsets.tolist()) == (0, 0, [0])


@given(
    st.lists(
        st.dictionaries(st.text(max_size=4), st.none() | st.text(max_size=8), max_size=5),
        max_size=6,
    )
)
def test_encode_items_agrees_with_a_plain_loop(
    trained: PreTrainedTokenizerFast, items: list[dict[str, str | None]]
) -> None:
    tokenizer = RecformerTokenizer(trained, RecformerConfig(**SHAPE))
    backend = trained.backend_tokenizer
    input_ids, token_type_ids, offsets = tokenizer.encode_items(items)
    for index, item in enumerate(items):
        ids, types = [], []
        present = [(name, value) for name, value in item.items() if value is not None]
        for name, value in present[:3]:
            name_ids = backend.encode(name, add_special_tokens=False).ids
            value_ids = backend.encode(value, add_special_tokens=False).ids
            ids += (name_ids + value_ids)[:4]
            types += ([1] * len(name_ids) + [2] * len(value_ids))[:4]
        place = slice(offsets[index], offsets[index + 1])
        assert input_ids[place].tolist() == ids
        assert token_type_ids[place].tolist() == types


def test_broken_surrogates_are_replaced(trained: PreTrainedTokenizerFast) -> None:
    tokenizer = RecformerTokenizer(trained, RecformerConfig(max_attr_length=64))
    broken = tokenizer.encode_items([{"title": "red \ud800 pen"}, {"title": "blue pen"}])
    whole = tokenizer.encode_items([{"title": "red \ufffd pen"}, {"title": "blue pen"}])
    assert broken[0].tolist() == whole[0].tolist()


def test_ragged_indices() -> None:
    starts, lengths = np.array([4, 0, 9, 2]), np.array([2, 0, 1, 3])
    assert ragged_indices(starts, lengths).tolist() == [4, 5, 9, 2, 3, 4]
    assert ragged_indices(np.array([], int), np.array([], int)).tolist() == []


# A sequence


def test_sequence_is_newest_first_behind_bos(hand: RecformerTokenizer) -> None:
    encoded = hand([{"title": "red"}, {"brand": "Bic"}, {"color": "blue pen"}])
    assert encoded == {
        "input_ids": [0, COLOR, BLUE, PEN + SPACE, BRAND, BIC, TITLE, RED],
        "item_position_ids": [0, 1, 1, 1, 2, 2, 3, 3],
        "token_type_ids": [0, 1, 2, 2, 1, 2, 1, 2],
        "attention_mask": [1] * 8,
        "global_attention_mask": [1, 0, 0, 0, 0, 0, 0, 0],
    }
    assert list(encoded) == KEYS


def test_oldest_items_fall_off(hand: RecformerTokenizer) -> None:
    values = ["red", "blue", "pen", "ink", "Bic"]
    encoded = hand([{"title": value} for value in values])
    assert encoded["input_ids"] == [0, TITLE, BIC, TITLE, INK, TITLE, PEN]
    assert encoded["item_position_ids"] == [0, 1, 1, 2, 2, 3, 3]


def test_an_item_without_text_keeps_its_position(hand: RecformerTokenizer) -> None:
    encoded = hand([{"title": "red"}, {}, {"title": "pen"}])
    assert encoded["input_ids"] == [0, TITLE, PEN, TITLE, RED]
    assert encoded["item_position_ids"] == [0, 1, 1, 3, 3]


def test_tokens_are_cut_to_max_token_num(hand: RecformerTokenizer) -> None:
    long = {"title": "red red red", "brand": "Bic"}  # 4 + 2 tokens
    encoded = hand([long, long])
    item = [TITLE, RED, RED + SPACE, RED + SPACE, BRAND, BIC]
    assert encoded["input_ids"] == [0, *item, *item[:5]]
    assert encoded["item_position_ids"] == [0, *[1] * 6, *[2] * 5]
    assert [len(encoded[key]) for key in KEYS] == [12] * 5


def test_batch_is_padded_on_the_right(hand: RecformerTokenizer) -> None:
    assert hand([[{"title": "red"}], [{"title": "red"}, {"brand": "Bic"}]]) == {
        "input_ids": [[0, TITLE, RED, 1, 1], [0, BRAND, BIC, TITLE, RED]],
        "item_position_ids": [[0, 1, 1, 3, 3], [0, 1, 1, 2, 2]],
        "token_type_ids": [[0, 1, 2, 3, 3], [0, 1, 2, 1, 2]],
        "attention_mask": [[1, 1, 1, 0, 0], [1] * 5],
        "global_attention_mask": [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
    }


def test_pad_to_max(hand: RecformerTokenizer) -> None:
    batch = hand([[{"title": "red"}]], pad_to_max=True)
    assert batch["input_ids"] == [[0, TITLE, RED, *[1] * 9]]
    assert batch["item_position_ids"] == [[0, 1, 1, *[3] * 9]]
    assert hand([{"title": "red"}], pad_to_max=True) == {key: batch[key][0] for key in KEYS}


def test_tensors(hand: RecformerTokenizer) -> None:
    one = hand([{"title": "red"}], return_tensor=True)
    batch = hand([[{"title": "red"}], [{"title": "red blue"}]], return_tensor=True)
    assert list(one) == list(batch) == KEYS
    assert all(one[key].shape == (3,) and batch[key].shape == (2, 4) for key in KEYS)
    assert all(one[key].dtype == batch[key].dtype == torch.int64 for key in KEYS)
    assert batch["input_ids"].tolist() == [[0, TITLE, RED, 1], [0, TITLE, RED, BLUE + SPACE]]


def test_one_item_is_a_sequence_of_one(hand: RecformerTokenizer) -> None:
    assert hand({"title": "red"}) == hand([{"title": "red"}])


def test_encoded_items_give_the_same(hand: RecformerTokenizer) -> None:
    batch = [[{"title": "red"}, {"brand": "Bic"}], [{"title": "blue pen"}]]
    pairs = [[list(hand.encode_item(item)) for item in items] for items in batch]
    kept = copy.deepcopy(pairs)
    assert hand.encode(pairs[0], encode_item=False) == hand.encode(batch[0]) == hand(batch[0])
    assert hand.batch_encode(pairs, encode_item=False) == hand.batch_encode(batch) == hand(batch)
    assert pairs == kept


def test_nothing_given_is_changed(hand: RecformerTokenizer) -> None:
    batch = [[{"title": "red"}], [{"title": ["red", "pen"]}]]
    kept = copy.deepcopy(batch)
    encoded = [hand.encode(items) for items in batch]
    kept_encoded = copy.deepcopy(encoded)
    hand(batch)
    hand.padding(encoded, pad_to_max=True)
    assert (batch, encoded) == (kept, kept_encoded)


def test_configuration_belongs_to_the_instance(folder: Path, hand: RecformerTokenizer) -> None:
    short = RecformerTokenizer.from_pretrained(folder, RecformerConfig(max_attr_length=2))
    item = {"title": "red blue"}
    assert len(short.encode_item(item)[0]) == 2
    assert len(hand.encode_item(item)[0]) == 3
    assert short.fingerprint != hand.fingerprint


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("red pen", "'red pen'.*expected a list of items"),
        ([], "empty sequence"),
        ([[]], "sequence 0 of the batch is \\[\\]"),
        ([[{"title": "red"}], {"title": "red"}], "sequence 1 of the batch"),
        (["red"], "item 0 is 'red'.*expected a dict"),
        ([{"title": "red"}, 5], "item 1 is 5"),
        ([{"title": {"en": "red"}}], "value of 'title'.*dict"),
        ([{"title": "red", 7: "x"}], "attribute name 7"),
        (None, "expected a list of items"),
    ],
)
def test_wrong_items_are_refused(hand: RecformerTokenizer, items: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hand(items)  # type: ignore[arg-type]


def test_wrong_encoded_items_are_refused(hand: RecformerTokenizer) -> None:
    with pytest.raises(ValueError, match="encode_item=False"):
        hand.encode([{"title": "red"}], encode_item=False)
    with pytest.raises(ValueError, match="of one length"):
        hand.encode([[[5, 6], [1]]], encode_item=False)
    with pytest.raises(ValueError, match="empty batch"):
        hand.padding([])


def test_a_sequence_too_long_to_pad_is_refused(hand: RecformerTokenizer) -> None:
    long = {key: [1] * 13 for key in KEYS}
    with pytest.raises(ValueError, match="13 tokens, max_token_num is 12"):
        hand.padding([long], pad_to_max=True)


# Special tokens written in a text


def test_roberta_reads_special_tokens_in_texts_as_published(hand: RecformerTokenizer) -> None:
    # `<mask>` takes the space before it, as RoBERTa's does
    assert hand.encode_item({"title": "red <mask></s>"})[0] == [TITLE, RED, 4, 2]


def test_special_tokens_in_texts_can_be_text(folder: Path, hand: RecformerTokenizer) -> None:
    config = RecformerConfig(max_attr_length=32)
    plain = RecformerTokenizer.from_pretrained(folder, config, split_special_tokens=True)
    tokens = plain.convert_ids_to_tokens(plain.encode_item({"title": "<s>red<mask>"})[0])
    assert tokens == ["title", *"<s>", "red", *"<mask>"]
    copied = pickle.loads(pickle.dumps(plain))
    assert copied.encode_item({"title": "<mask>"}) == plain.encode_item({"title": "<mask>"})
    assert plain.split_special_tokens
    assert not hand.split_special_tokens


def test_trained_tokenizer_takes_special_tokens_as_text(trained: PreTrainedTokenizerFast) -> None:
    tokenizer = RecformerTokenizer(trained, RecformerConfig(max_attr_length=64))
    ids, _ = tokenizer.encode_item({"title": "<s></s><pad><unk><mask>"})
    assert not set(ids) & set(range(5))
    assert tokenizer.decode(ids) == "title<s></s><pad><unk><mask>"


# Where tokenizers come from


def test_special_ids(hand: RecformerTokenizer) -> None:
    ids = (hand.bos_token_id, hand.pad_token_id, hand.eos_token_id, hand.mask_token_id)
    assert ids == (0, 1, 2, 4)
    assert len(hand) == hand.vocab_size == len(hand._backend.get_vocab())


def test_vocab_size_covers_holes() -> None:
    vocab = {"[UNK]": 0, "[CLS]": 1, "[PAD]": 2, "red": 9}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="[UNK]")),
        unk_token="[UNK]",
        cls_token="[CLS]",
        pad_token="[PAD]",
    )
    tokenizer = RecformerTokenizer(fast, RecformerConfig())
    assert tokenizer.vocab_size == 10
    with pytest.raises(ValueError, match="no mask_token"):
        _ = tokenizer.mask_token_id


def test_a_tokenizer_without_padding_token_is_refused() -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>")), bos_token="<s>"
    )
    with pytest.raises(ValueError, match="no pad_token"):
        RecformerTokenizer(fast, RecformerConfig())


def test_saved_folder_gives_the_same(folder: Path, tmp_path: Path) -> None:
    config = RecformerConfig(**SHAPE)
    for split in (False, True):
        tokenizer = RecformerTokenizer.from_pretrained(folder, config, split_special_tokens=split)
        tokenizer.save_pretrained(tmp_path / "saved")
        config.save_pretrained(tmp_path / "saved")
        loaded = RecformerTokenizer.from_pretrained(tmp_path / "saved")
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.special_tokens == tokenizer.special_tokens
        assert {key: getattr(loaded.config, key) for key in SHAPE} == SHAPE
        items = [{"title": "red <mask> </s>"}, {"brand": "Bic"}]
        assert loaded(items) == tokenizer(items)


def test_saved_folder_is_an_ordinary_one(hand: RecformerTokenizer, tmp_path: Path) -> None:
    hand.save_pretrained(tmp_path)
    ordinary = AutoTokenizer.from_pretrained(tmp_path)
    assert ordinary("red pen").input_ids == [0, RED, PEN + SPACE, 2]
    assert (ordinary.mask_token_id, ordinary.pad_token_id, ordinary.bos_token_id) == (4, 1, 0)
    assert not list(tmp_path.glob(".*"))


def test_word_piece_folder(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(word_piece_tokens()) + "\n")
    bare = RecformerTokenizer.from_pretrained(tmp_path, RecformerConfig(**SHAPE))
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id) == (2, 3, 0)
    encoded = bare([{"title": "Red pens"}])
    s = word_piece_tokens().index("##s")
    assert encoded["input_ids"] == [2, 5, 6, 7, s]
    assert encoded["token_type_ids"] == [0, 1, 2, 2, 2]
    # no released model of this family reads special tokens out of titles
    assert 4 not in bare.encode_item({"title": "[MASK]"})[0]

    # the same with padding and truncation baked in, as sentence encoders ship it
    backend = Tokenizer.from_str(bare._backend.to_str())
    backend.enable_padding(length=16)
    backend.enable_truncation(max_length=3)
    baked = tmp_path / "baked"
    bare.save_pretrained(baked)
    (baked / "tokenizer.json").write_text(backend.to_str())
    (baked / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    loaded = RecformerTokenizer.from_pretrained(baked, RecformerConfig(**SHAPE))
    assert loaded([{"title": "Red pens"}]) == encoded
    assert loaded.fingerprint == bare.fingerprint
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert (saved["padding"], saved["truncation"]) == (None, None)


def test_the_tokenizer_given_stays_as_it_is(trained: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(trained)
    own.backend_tokenizer.enable_padding(length=16)
    own.backend_tokenizer.enable_truncation(max_length=3)
    before = own.backend_tokenizer.to_str()
    tokenizer = RecformerTokenizer(own, RecformerConfig(max_attr_length=32))
    tokenizer([{"title": "red blue red pen"}])
    assert own.backend_tokenizer.to_str() == before
    # and what is done to it later does not reach in
    own.backend_tokenizer.encode_special_tokens = False
    assert 4 not in tokenizer.encode_item({"title": "<mask>"})[0]


def test_fingerprint_is_of_what_matters(folder: Path, tmp_path: Path) -> None:
    def fingerprint(source: Path = folder, **fields: int) -> str:
        config = RecformerConfig(**{**SHAPE, **fields})
        return RecformerTokenizer.from_pretrained(source, config).fingerprint

    assert fingerprint() == fingerprint()
    # neither changes the tokens of an item
    assert fingerprint(max_item_embeddings=9, max_token_num=99) == fingerprint()
    assert fingerprint(max_attr_num=2) != fingerprint()
    assert fingerprint(max_attr_length=5) != fingerprint()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    lines = (other / "merges.txt").read_text().splitlines()
    (other / "merges.txt").write_text("\n".join(lines[:-1]) + "\n")
    assert fingerprint(other) != fingerprint()


def test_folders_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    config = RecformerConfig()

    def load(source: Path | str, config: RecformerConfig | None = config) -> None:
        RecformerTokenizer.from_pretrained(source, config)

    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: expected tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match="a folder here or a model of the hub"):
        load("no-such/model")
    with pytest.raises(ValueError, match="pass config="):
        load(folder, None)

    damaged = tmp_path / "damaged"
    RecformerTokenizer.from_pretrained(folder, config).save_pretrained(damaged)
    whole = (damaged / "tokenizer.json").read_text()
    (damaged / "tokenizer.json").write_text(whole[:500])
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*damaged"):
        load(damaged)

    other = tmp_path / "gpt2"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (other / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="has no <s>"):
        load(other)


def test_configuration_of_another_model_is_no_item_configuration(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(word_piece_tokens()) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(ValueError, match="'bert' model and has no max_attr_num"):
        RecformerTokenizer.from_pretrained(tmp_path)


# Training


def test_trained_tokenizer(tmp_path: Path) -> None:
    texts = ["red pen", "red ink", "title", "brand"] * 3
    trained = train_tokenizer(texts, 290, tmp_path)
    config = RecformerConfig(max_attr_length=64)
    tokenizer = RecformerTokenizer.from_pretrained(tmp_path, config)
    assert tokenizer.fingerprint == RecformerTokenizer(trained, config).fingerprint
    special = tokenizer.convert_ids_to_tokens(range(5))
    assert special == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    ids, types = tokenizer.encode_item({"title": "red pen"})
    assert tokenizer.convert_ids_to_tokens(ids) == ["title", "red", "Ġpen"]
    assert types == [1, 2, 2]
    # any text at all, without <unk>
    strange = "Müller 日本製 😀\t\x00"
    ids, _ = tokenizer.encode_item({"title": strange})
    assert not set(ids) & set(range(5))
    assert tokenizer.decode(ids) == f"title{strange}"
    assert AutoTokenizer.from_pretrained(tmp_path)("red").input_ids[::2] == [0, 2]


def test_training_is_deterministic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh"))
    texts = ["".join(rng.choice(letters, 5)) for _ in range(500)]
    (tmp_path / "meta.json").write_text(json.dumps({str(i): {"t": x} for i, x in enumerate(texts)}))
    expected = train_tokenizer(texts, 400).backend_tokenizer.to_str()
    assert train_tokenizer(texts[::-1], 400).backend_tokenizer.to_str() == expected
    # another process has other hash seeds and may use more threads
    code = (
        "import sys; from recformer.tokenization import train_tokenizer\n"
        "texts = sys.stdin.read().split()\n"
        "sys.stdout.write(train_tokenizer(texts, 400).backend_tokenizer.to_str())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(texts),
        env={**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == expected


def test_training_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 261"):
        train_tokenizer(["red"], 260)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 300)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", ""], 300)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps({"A": {"title": "red pen", "brand": None}}))
    files[1].write_text(json.dumps({"B": {"title": ["red", "pen"]}}))
    main(["--meta_file", *map(str, files), "--vocab_size", "4096", "--output_dir", f"{tmp_path}/t"])
    assert "wrote a byte-level BPE tokenizer of 27" in capsys.readouterr().out
    tokenizer = RecformerTokenizer.from_pretrained(tmp_path / "t", RecformerConfig())
    ids, _ = tokenizer.encode_item({"title": "red pen"})
    assert tokenizer.convert_ids_to_tokens(ids) == ["title", "red", "Ġpen"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "meta.json does not exist"),
        ("[]", "expected {asin: {attribute: text}}"),
        ('{"A": {"title": {}}}', "item 0: the value of 'title'"),
        ('{"A": "x"}', "expected a dict of attributes"),
        ('{"A": ', "is not valid JSON"),
        ("{}", "no text to train a tokenizer on"),
    ],
)
def test_command_line_refuses(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    command = ["--meta_file", f"{tmp_path}/meta.json", "--output_dir", f"{tmp_path}/t"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(command)
    assert not (tmp_path / "t").exists()


def test_command_line_error_is_one_line(tmp_path: Path) -> None:
    command = ["--meta_file", f"{tmp_path}/meta.json", "--output_dir", f"{tmp_path}/t"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recformer", "tokenizer", *command],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path}/meta.json does not exist\n"


# The published outputs


@pytest.mark.real_data
def test_published_outputs(real_data: Path, tmp_path: Path) -> None:
    path = real_data.parent / "golden" / "tokenization.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the real data")
    golden = json.loads(path.read_text())
    config = RecformerConfig(**golden["config"])
    tokenizer = RecformerTokenizer.from_pretrained(real_data / "roberta_tokenizer", config)
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, RecformerTokenizer.from_pretrained(tmp_path, config)):
        for entry in golden["items"]:
            assert list(same.encode_item(entry["item"])) == entry["encoded"]
        for entry in golden["sequences"]:
            assert same(entry["items"]) == entry["encoded"]
        batch = [entry["items"] for entry in golden["sequences"][:4]]
        assert same(batch) == golden["padded_batch_of_first_4_sequences"]
    ids, types, offsets = tokenizer.encode_items([entry["item"] for entry in golden["items"]])
    for entry, start, end in zip(golden["items"], offsets, offsets[1:]):
        assert [ids[start:end].tolist(), types[start:end].tolist()] == entry["encoded"]
