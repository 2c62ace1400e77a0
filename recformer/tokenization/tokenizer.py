"""The tokenizer of item sequences."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from recformer.config import RecformerConfig
from recformer.files import UserError, sha256_of
from recformer.tokenization.files import load_config, load_fast_tokenizer, save_tokenizer
from recformer.tokenization.texts import (
    LONG_TEXT,
    WORDS_A_TOKEN,
    Item,
    first_words,
    item_texts,
    show,
)

# Token types: `<s>`, attribute name, attribute value, padding.
CLS_TYPE, NAME_TYPE, VALUE_TYPE, PAD_TYPE = range(4)


# Enters the fingerprint: raise it when the sentence of an item changes its meaning.
SENTENCE_FORM = "item sentence 1"


Encoding = dict[str, list[int]]


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> npt.NDArray[np.int64]:
    """Indices of many runs, one run after the other: `starts[i], …, starts[i] + lengths[i] - 1`.

    Args:
        starts, lengths: (S,) integers; a run may be empty.

    Returns:
        (lengths.sum(),) int64.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


class RecformerTokenizer:
    """Items and item sequences to token ids, as published, on a fast tokenizer.

    Args:
        tokenizer: a fast tokenizer with a `<s>` (or `[CLS]`, which plays it) and a padding token. A
            private copy of its backend is used, with padding and truncation off.
        config: max_attr_num, max_attr_length, max_item_embeddings and max_token_num are read from
            it at every call, so two tokenizers with two configurations do not disturb each other.

    Raises:
        ValueError: the tokenizer is not a fast one or lacks a special token.

    Examples:
        >>> tokenizer = RecformerTokenizer.from_pretrained("result/best_model")
        >>> ids, types = tokenizer.encode_item({"title": "red tent", "brand": "Acme"})
        >>> tokenizer.convert_ids_to_tokens(ids)
        ['title', 'red', 'tent', 'brand', 'acme']
        >>> types  # 1: an attribute's name, 2: its value
        [1, 2, 2, 1, 2]
        >>> history = [{"title": "tent"}, {"title": "lamp"}]  # oldest first
        >>> encoding = tokenizer.encode(history)
        >>> tokenizer.convert_ids_to_tokens(encoding["input_ids"])  # newest first, behind <s>
        ['[CLS]', 'title', 'lamp', 'title', 'tent']
        >>> encoding["item_position_ids"]
        [0, 1, 1, 2, 2]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: RecformerConfig) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} is not a fast (Rust) tokenizer; "
                "a folder with a tokenizer.json has one"
            )
        self.config = config
        self.special_tokens: dict[str, str] = {
            role: str(token)
            for role, token in tokenizer.special_tokens_map.items()
            if isinstance(token, (str, AddedToken))
        }
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        # published: `<mask>` or `</s>` written in a title becomes that special token, and released
        # checkpoints have seen it so. The BERT family and tokenizers trained here have no such
        # past: to them it is text like any other.
        self.split_special_tokens = (
            bool(tokenizer.split_special_tokens) or "bos_token" not in self.special_tokens
        )
        self._backend.encode_special_tokens = self.split_special_tokens

        # The largest id and not the number of entries: a vocabulary may have holes.
        self._num_ids = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_token_id = self._role_id("bos_token", "cls_token")
        self.pad_token_id = self._role_id("pad_token")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        config: RecformerConfig | None = None,
        **kwargs: Any,
    ) -> RecformerTokenizer:
        """Load from a folder or a hub id.

        A folder may hold a `tokenizer.json` (any BERT, RoBERTa or Longformer family, and what
        `save_pretrained` writes), `vocab.json` and `merges.txt` alone (RoBERTa, Longformer), or
        `vocab.txt` alone (BERT).

        Args:
            config: None reads the `config.json` in the same place.
            kwargs: passed on to transformers: `revision`, `token`, …, and
                `split_special_tokens=True`, which takes a `<mask>` written in a title as text.

        Raises:
            FileNotFoundError: no such folder, or no tokenizer in it.
            ValueError: it cannot be read, or `config` is None and the configuration there says
                nothing about items.
        """
        source = os.fspath(pretrained_model_name_or_path)
        tokenizer = load_fast_tokenizer(source, **kwargs)
        return cls(tokenizer, load_config(source, **kwargs) if config is None else config)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write an ordinary tokenizer folder, which AutoTokenizer of transformers reads as well.

        Files: tokenizer.json, tokenizer_config.json, special_tokens_map.json. The configuration is
        the model's to save.
        """
        save_tokenizer(
            self._backend, self.special_tokens, self.split_special_tokens, save_directory
        )

    # The flag is not part of the backend's own pickle.
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = self.split_special_tokens

    def __len__(self) -> int:
        return self._num_ids

    @property
    def vocab_size(self) -> int:
        """Rows that a word embedding needs: the largest token id + 1."""
        return self._num_ids

    @property
    def eos_token_id(self) -> int:
        return self._role_id("eos_token", "sep_token")

    @property
    def mask_token_id(self) -> int:
        return self._role_id("mask_token")

    def _role_id(self, *roles: str) -> int:
        for role in roles:
            token = self.special_tokens.get(role)
            token_id = None if token is None else self._backend.token_to_id(token)
            if token_id is not None:
                return token_id
        raise UserError(
            f"the tokenizer has no {' or '.join(roles)}; it has {self.special_tokens}. "
            "Use one of the BERT, RoBERTa or Longformer family"
        )

    @cached_property
    def _content_digest(self) -> str:
        """SHA-256 of what decides which ids a text becomes."""
        content = json.loads(self._backend.to_str())
        keys = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        return sha256_of(json.dumps({key: content[key] for key in keys}, sort_keys=True))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that the ids of an item depend on, other than its texts."""
        form = (self.split_special_tokens, self.config.max_attr_num, self.config.max_attr_length)
        return sha256_of(SENTENCE_FORM, self._content_digest, *map(str, form))

    @property
    def vocabulary_kind(self) -> str:
        """WordPiece, BPE or Unigram, as the `tokenizers` library names its models."""
        return json.loads(self._backend.to_str())["model"]["type"]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens written out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """The token of every id, None where there is none."""
        return [self._backend.id_to_token(token_id) for token_id in token_ids]

    def encode_items(
        self, items: Sequence[Item]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Token ids of many items at once.

        Every different text is tokenised once. An item without attributes has no tokens.

        Args:
            items: N dicts, attributes in order.

        Returns:
            input_ids (T,) int32, token_type_ids (T,) uint8 (1 name, 2 value) and offsets (N + 1,)
            int64: item i has the tokens `offsets[i]:offsets[i + 1]`.

        Raises:
            ValueError: see `item_texts`.
        """
        texts, counts = item_texts(items, self.config.max_attr_num)
        texts = [text if len(text) <= LONG_TEXT else self._beginning(text) for text in texts]
        index: dict[str, int] = {}
        text_ids = np.fromiter(
            (index.setdefault(text, len(index)) for text in texts), np.int64, len(texts)
        )
        flat, lengths = self._tokenize(list(index))
        starts = np.cumsum(lengths) - lengths

        # Name and value of an attribute are cut together: the value has what the name leaves.
        longest = self.config.max_attr_length
        kept = np.minimum(lengths[text_ids].reshape(-1, 2).cumsum(axis=1), longest)
        attribute_ends = np.concatenate(([0], kept[:, 1].cumsum()))
        kept[:, 1] -= kept[:, 0]

        input_ids = flat[ragged_indices(starts[text_ids], kept.ravel())]
        types = np.tile(np.array([NAME_TYPE, VALUE_TYPE], dtype=np.uint8), len(kept))
        token_type_ids = np.repeat(types, kept.ravel())
        offsets = attribute_ends[np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))]
        return input_ids, token_type_ids, offsets

    def _beginning(self, text: str) -> str:
        """What of a long text can make the first `max_attr_length` tokens."""
        text = first_words(text, WORDS_A_TOKEN * self.config.max_attr_length)
        if len(text) <= LONG_TEXT:
            return text
        most = self._most_characters
        return re.sub(rf"\S{{{most},}}|\s{{{most},}}", lambda run: run[0][:most], text)

    @cached_property
    def _most_characters(self) -> int:
        longest = max(map(len, self._backend.get_vocab()), default=1)
        return max(LONG_TEXT, 2 * self.config.max_attr_length * longest)

    def _tokenize(self, texts: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of `texts` end to end, (T,) int32, and the number of tokens of each, int64."""
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            # Half a surrogate pair, as a broken JSON escape leaves it, is no Unicode for Rust.
            whole = [
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
            ]
            encodings = self._backend.encode_batch_fast(whole, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    def encode_item(self, item: Item) -> tuple[list[int], list[int]]:
        """input_ids and token_type_ids (1 name, 2 value) of one item."""
        input_ids, token_type_ids, _ = self.encode_items([item])
        return input_ids.tolist(), token_type_ids.tolist()

    def encode(self, items: Sequence[Any], encode_item: bool = True) -> Encoding:
        """Encode one sequence of items, oldest first.

        The output has the newest item first, at most `max_item_embeddings - 1` items and at most
        `max_token_num` tokens.

        Args:
            items: dicts; with `encode_item=False` `[input_ids, token_type_ids]` pairs.

        Returns:
            Lists of one length: input_ids; item_position_ids (0 for `<s>`, k for the k-th newest
            item); token_type_ids (0 `<s>`, 1 name, 2 value); attention_mask (all 1);
            global_attention_mask (1 at `<s>`).

        Raises:
            ValueError: not a list, an empty one, or items of the wrong kind.
        """
        _check_sequence(items)
        # Nothing older than what is kept is looked at.
        recent = items[max(0, len(items) - (self.config.max_item_embeddings - 1)) :]
        pairs = self._encode_each(recent) if encode_item else recent

        input_ids, item_position_ids, token_type_ids = [self.bos_token_id], [0], [CLS_TYPE]
        for position, pair in enumerate(reversed(pairs), 1):
            ids, types = _check_pair(pair)
            input_ids.extend(ids)
            token_type_ids.extend(types)
            item_position_ids.extend([position] * len(ids))

        length = min(len(input_ids), self.config.max_token_num)
        return {
            "input_ids": input_ids[:length],
            "item_position_ids": item_position_ids[:length],
            "token_type_ids": token_type_ids[:length],
            "attention_mask": [1] * length,
            "global_attention_mask": [1] + [0] * (length - 1),
        }

    def _encode_each(self, items: Sequence[Item]) -> list[tuple[list[int], list[int]]]:
        input_ids, token_type_ids, offsets = self.encode_items(items)
        borders = offsets.tolist()
        return [
            (input_ids[start:end].tolist(), token_type_ids[start:end].tolist())
            for start, end in pairwise(borders)
        ]

    def batch_encode(
        self,
        item_batch: Sequence[Sequence[Any]],
        encode_item: bool = True,
        pad_to_max: bool = False,
    ) -> dict[str, list[list[int]]]:
        """Encode and pad a batch of sequences: `encode` of each, then `padding`."""
        _check_batch(item_batch)
        return self.padding([self.encode(items, encode_item) for items in item_batch], pad_to_max)

    def padding(
        self, item_batch: Sequence[Encoding], pad_to_max: bool = False
    ) -> dict[str, list[list[int]]]:
        """Pad encoded sequences on the right; the encodings given stay as they are.

        Args:
            item_batch: outputs of `encode`.
            pad_to_max: to `max_token_num` instead of the longest of the batch.

        Returns:
            For every key a list of lists of one length. Padding has the padding id, token type 3,
            item position `max_item_embeddings - 1` and 0 in both masks.

        Raises:
            ValueError: an empty batch, or a sequence longer than `max_token_num`.
        """
        if not item_batch:
            raise UserError("an empty batch cannot be padded")
        length = max(len(encoding["input_ids"]) for encoding in item_batch)
        if pad_to_max:
            if length > self.config.max_token_num:
                raise UserError(
                    f"a sequence has {length} tokens, max_token_num is {self.config.max_token_num}"
                )
            length = self.config.max_token_num
        fill = {
            "input_ids": self.pad_token_id,
            # published: padding shares the position of the oldest item that can be told apart.
            "item_position_ids": self.config.max_item_embeddings - 1,
            "token_type_ids": PAD_TYPE,
            "attention_mask": 0,
            "global_attention_mask": 0,
        }
        return {
            key: [
                encoding[key] + [value] * (length - len(encoding[key])) for encoding in item_batch
            ]
            for key, value in fill.items()
        }

    def __call__(
        self,
        items: Item | Sequence[Item] | Sequence[Sequence[Item]],
        pad_to_max: bool = False,
        return_tensor: bool = False,
    ) -> dict[str, Any]:
        """Encode an item, one sequence of items (oldest first) or a batch of sequences.

        Args:
            pad_to_max: pad to `max_token_num` tokens. Otherwise a batch is padded to its longest
                sequence and one sequence not at all.
            return_tensor: int64 tensors, (L,) or (B, L), instead of lists.

        Returns:
            input_ids, item_position_ids, token_type_ids, attention_mask, global_attention_mask.

        Raises:
            ValueError: anything but dicts in lists, or an empty list.
        """
        if isinstance(items, Mapping):
            items = [items]
        _check_sequence(items)
        inputs: Mapping[str, Any]
        if isinstance(items[0], (list, tuple)):
            inputs = self.batch_encode(cast(Sequence[Sequence[Item]], items), pad_to_max=pad_to_max)
        else:
            encoding = self.encode(items)
            inputs = encoding
            # published: pad_to_max was ignored for one sequence.
            if pad_to_max:
                inputs = {key: rows[0] for key, rows in self.padding([encoding], True).items()}
        if return_tensor:
            return {key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()}
        return dict(inputs)


def _check_sequence(items: Any) -> None:
    if not isinstance(items, (list, tuple)):
        raise UserError(f"got {show(items)}, expected a list of items (dicts), oldest first")
    if not items:
        raise UserError("got an empty sequence, expected at least one item")


def _check_batch(item_batch: Any) -> None:
    _check_sequence(item_batch)
    for row, items in enumerate(item_batch):
        if not isinstance(items, (list, tuple)) or not items:
            raise UserError(
                f"sequence {row} of the batch is {show(items)}, expected a list of items with at "
                "least one of them"
            )


def _check_pair(pair: Any) -> tuple[Sequence[int], Sequence[int]]:
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and len(pair[0]) == len(pair[1]):
        return pair[0], pair[1]
    raise UserError(
        f"got {show(pair)}, expected a pair [input_ids, token_type_ids] of one length "
        "(encode_item=False takes items that are encoded already)"
    )
