"""Whole-word masking: borders, shares, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recformer import RecformerConfig
from recformer.data.batches import NO_LABEL
from recformer.data.collators import pack_sequences
from recformer.data.items import TokenizedItems
from recformer.data.masking import WholeWordMasker, continues_word
from recformer.packing import PackedTokens
from recformer.tokenization import RecformerTokenizer, train_tokenizer

ITEMS = [
    {"title": "unbelievably waterproof saddlebags", "brand": "Ortlieb", "category": "Cycling bags"},
    {"title": "brass bell", "brand": "", "category": "Bells"},
    {"title": "", "brand": "", "category": ""},
    {"title": "x"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> RecformerTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [" ".join(v) for v in (item.values() for item in ITEMS)] + ["title brand category"]
    train_tokenizer(texts * 3, 320, folder)
    return RecformerTokenizer.from_pretrained(folder, RecformerConfig(max_attr_num=3))


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory) -> TokenizedItems:
    return TokenizedItems.open_or_build(ITEMS, tokenizer, tmp_path_factory.mktemp("store"))


def packed(store, tokenizer, sequences) -> PackedTokens:
    config = RecformerConfig(
        max_attr_num=3,
        max_item_embeddings=9,
        max_token_num=200,
        bos_token_id=tokenizer.bos_token_id,
    )
    return pack_sequences(store, [np.array(sequence) for sequence in sequences], config)


def masker(tokenizer, probability=0.15) -> WholeWordMasker:
    return WholeWordMasker(tokenizer, probability, ["title", "brand", "category"])


def attributes(tokenizer, item) -> list[list[int]]:
    """Token ids of every name and value of an item, in order."""
    parts = []
    for name, value in item.items():
        ids = tokenizer.encode_item({name: value})[0]
        size = len(tokenizer.encode_item({name: ""})[0])
        parts += [ids[:size], ids[size:]]
    return [part for part in parts if part]


def words_by_hand(tokenizer, sequence) -> list[int]:
    """Word of each token of a sequence (newest first), `<s>` being word 0."""
    words, word = [0], 0
    for item in sequence[::-1]:
        for part in attributes(tokenizer, ITEMS[item]):
            for place, token in enumerate(tokenizer.convert_ids_to_tokens(part)):
                word += place == 0 or token.startswith("Ġ")
                words.append(word)
    return words


def test_words_end_at_attribute_and_item_borders(store, tokenizer):
    sequence = [0, 1, 2, 3, 2, 0]
    batch = packed(store, tokenizer, [sequence])
    starts = masker(tokenizer)._word_starts(batch, batch.offsets_in_sequence.numpy())
    assert (np.cumsum(starts) - 1).tolist() == words_by_hand(tokenizer, sequence)
    # The empty item is three names side by side: only they tell where the next one begins.
    empty = packed(store, tokenizer, [[2]])
    starts = masker(tokenizer)._word_starts(empty, empty.offsets_in_sequence.numpy())
    assert starts.sum() == 4


def test_whole_words_are_chosen_and_never_the_first_token(store, tokenizer):
    sequences = [[0, 1], [3], [2, 1, 0], [0] * 8] * 25
    batch = packed(store, tokenizer, sequences)
    masked, labels = masker(tokenizer)(batch, np.arange(100))
    chosen = labels != NO_LABEL
    assert torch.equal(labels[chosen], batch.input_ids[chosen])
    assert torch.equal(masked[~chosen], batch.input_ids[~chosen])
    for number, sequence in enumerate(sequences):
        begin, end = batch.cu_seqlens[number : number + 2]
        words = np.array(words_by_hand(tokenizer, sequence))
        mine = chosen[begin:end].numpy()
        assert not mine[0]
        assert mine.any()
        for word in np.unique(words):
            assert mine[words == word].all() or not mine[words == word].any()


def test_shares(store, tokenizer):
    batch = packed(store, tokenizer, [[0, 1, 3, 2, 1, 0, 1]] * 600)
    masked, labels = masker(tokenizer)(batch, np.arange(600))
    chosen = labels != NO_LABEL
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.01)
    masked, truth = masked[chosen], labels[chosen]
    count = chosen.sum().item()
    assert (masked == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (masked == truth).float().mean() == pytest.approx(0.1, abs=0.02)
    others = masked[(masked != truth) & (masked != tokenizer.mask_token_id)]
    assert len(others) / count == pytest.approx(0.1, abs=0.02)
    assert len(others.unique()) > 100  # all over the vocabulary, but nothing special
    special = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    assert not torch.isin(others, torch.tensor(special)).any()


def test_a_sequence_is_masked_alike_in_any_batch(store, tokenizer):
    sequences = [[0, 1], [3], [2, 1, 0]]
    mask = masker(tokenizer)
    together = mask(packed(store, tokenizer, sequences), np.array([5, 6, 7]))
    alone = [
        mask(packed(store, tokenizer, [s]), np.array([seed]))
        for s, seed in zip(sequences, (5, 6, 7), strict=True)
    ]
    for column in (0, 1):
        assert torch.equal(together[column], torch.cat([each[column] for each in alone]))
    other = mask(packed(store, tokenizer, sequences), np.array([8, 9, 10]))
    assert not torch.equal(other[1], together[1])


def test_a_sequence_without_text_has_nothing_to_mask(store, tokenizer):
    ids = torch.tensor([tokenizer.bos_token_id])
    zero = torch.zeros(1, dtype=torch.long)
    masked, labels = masker(tokenizer)(
        PackedTokens(ids, zero, zero, torch.tensor([0, 1])), np.array([1])
    )
    assert masked.tolist() == ids.tolist()
    assert labels.tolist() == [NO_LABEL]


def test_everything_can_be_masked(store, tokenizer):
    _, labels = masker(tokenizer, 1.0)(packed(store, tokenizer, [[0, 1]]), np.array([1]))
    assert (labels == NO_LABEL).tolist() == [True] + [False] * (len(labels) - 1)


def test_word_beginnings_of_wordpiece(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "title", "bra", "##nd", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = RecformerTokenizer.from_pretrained(tmp_path, RecformerConfig())
    assert continues_word(tokenizer).tolist() == [False] * 7 + [True] * 2


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5])
def test_a_share_out_of_range_is_refused(tokenizer, probability):
    with pytest.raises(ValueError, match=r"share of masked tokens is .*\(0, 1\]"):
        masker(tokenizer, probability)
