"""Masked language modelling on packed tokens: whole words within attributes (paper, 2.3.1).

Words end where attributes and items do. `<s>` is never masked. What happens to a sequence depends
on its own seed and its own tokens alone, not on the batch it is in or the process that handles it.

Shapes: B sequences, T packed tokens, R words, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from recformer.data.batches import NO_LABEL
from recformer.data.draws import uniform
from recformer.files import UserError
from recformer.packing import PackedTokens
from recformer.tokenization import NAME_TYPE, RecformerTokenizer

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens; the rest stays as it is (BERT)

# Independent streams of random numbers for one sequence.
WORD_ORDER, REPLACEMENT, RANDOM_TOKEN = range(3)


def continues_word(tokenizer: RecformerTokenizer) -> np.ndarray:
    """Tokens that continue the word before them, (V,) bool.

    `##` marks them in WordPiece; in byte-level BPE (RoBERTa, Longformer) and in SentencePiece it is
    the beginning of a word that is marked.

    Raises:
        UserError: another kind of vocabulary.
    """
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    kind = tokenizer.vocabulary_kind
    if kind == "WordPiece":
        return np.array([token.startswith("##") for token in tokens])
    marker = {"BPE": "Ġ", "Unigram": "▁"}.get(kind)
    if marker is None:
        raise UserError(
            f"a {kind} vocabulary: where its words begin is not known. Use a tokenizer of the BERT "
            "(WordPiece), RoBERTa or Longformer (byte-level BPE), or XLM-R (Unigram) family"
        )
    return np.array([not token.startswith(marker) for token in tokens])


class WholeWordMasker:
    """Chooses words of each sequence and masks them.

    Args:
        tokenizer: its mask token, special tokens and vocabulary are read.
        probability: share of the tokens that is chosen; above 0, at most 1.
        attribute_names: of the catalogue. Names stand side by side where a value is empty, and only
            they tell where the next one begins.

    Raises:
        UserError: a probability out of range, no mask token, an unknown kind of vocabulary.
    """

    def __init__(
        self, tokenizer: RecformerTokenizer, probability: float, attribute_names: Iterable[str]
    ) -> None:
        if not 0 < probability <= 1:
            raise UserError(f"the share of masked tokens is {probability}, expected (0, 1]")
        self.probability = probability
        self.mask_token_id = tokenizer.mask_token_id
        self.continues_word = continues_word(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        special = set(tokenizer.special_tokens.values())
        self.ordinary_ids = np.array(
            [i for i, token in enumerate(tokens) if token is not None and token not in special]
        )
        names = [{name: ""} for name in attribute_names]
        firsts = [tokenizer.encode_item(name)[0][:1] for name in names]
        self.name_starts = np.zeros(len(tokenizer), dtype=bool)
        self.name_starts[[first[0] for first in firsts if first]] = True

    def __call__(self, packed: PackedTokens, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mask a batch.

        Args:
            packed: B sequences.
            seeds: (B,) int64, one a sequence.

        Returns:
            Masked ids and true ids, -100 where nothing is predicted, both (T,) int64. Every
            sequence with more than `<s>` has a masked token.
        """
        ids = packed.input_ids.numpy()
        sequence = packed.sequence_ids.numpy()  # (T,)
        place = packed.offsets_in_sequence.numpy()  # (T,)
        seed = np.asarray(seeds).astype(np.uint64)[sequence]
        word = np.cumsum(self._word_starts(packed, place)) - 1  # (T,) word of each token
        candidate = place > 0

        chosen = np.zeros(len(ids), dtype=bool)
        if candidate.any():
            chosen[candidate] = self._choose(
                word[candidate], sequence[candidate], place[candidate], seed[candidate]
            )
        labels = np.where(chosen, ids, NO_LABEL)

        lot = uniform(seed, place, REPLACEMENT)
        draw = (uniform(seed, place, RANDOM_TOKEN) * len(self.ordinary_ids)).astype(np.int64)
        masked = np.where(chosen & (lot < MASKED_SHARE), self.mask_token_id, ids)
        at_random = chosen & (lot >= MASKED_SHARE) & (lot < MASKED_SHARE + RANDOM_SHARE)
        masked = np.where(at_random, self.ordinary_ids[draw], masked)
        return torch.from_numpy(masked), torch.from_numpy(labels)

    def _word_starts(self, packed: PackedTokens, place: np.ndarray) -> np.ndarray:
        """(T,) whether a token begins a word; `<s>` and the token after it do."""
        ids, types = packed.input_ids.numpy(), packed.token_type_ids.numpy()
        positions = packed.item_position_ids.numpy()
        starts = ~self.continues_word[ids] | (place <= 1)
        starts[1:] |= (types[1:] != types[:-1]) | (positions[1:] != positions[:-1])
        starts |= (types == NAME_TYPE) & self.name_starts[ids]
        return starts

    def _choose(
        self, word: np.ndarray, sequence: np.ndarray, place: np.ndarray, seed: np.ndarray
    ) -> np.ndarray:
        """Candidate tokens (n,) that are chosen, all arguments (n,), whole words only.

        The words of a sequence are taken in random order until the next word would overshoot the
        budget by more than half its length, which makes the share right on average; the first word
        is always taken.
        """
        first = np.flatnonzero(np.diff(word, prepend=-1))  # (R,) first token of each word
        sizes = np.diff(first, append=len(word))
        owner = sequence[first]
        order = np.lexsort((uniform(seed[first], place[first], WORD_ORDER), owner))
        sizes_drawn, owner_drawn = sizes[order], owner[order]
        before = np.cumsum(sizes_drawn) - sizes_drawn
        opens = np.diff(owner_drawn, prepend=-1) != 0  # first drawn word of its sequence
        before -= np.maximum.accumulate(np.where(opens, before, 0))
        budget = np.bincount(sequence)[owner_drawn] * self.probability
        taken = np.empty(len(first), dtype=bool)
        taken[order] = opens | (before + sizes_drawn / 2 <= budget)
        return np.repeat(taken, sizes)
