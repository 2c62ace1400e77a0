"""Recommendation as generation: items are written code by code, and only items can be written.

A model gives log-probabilities of the next token for many beginnings of an item at once
(`CodeRecommender.start`, `step`). Beam search follows the trie of all items, so that every beam is
the beginning of an item and every result an item; one beam is greedy decoding. For small catalogues
`score_items` scores every item by teacher forcing, each prefix once.

A user's keys are kept once, not once a beam: a beam is one more query over them, and a row of a
mask holds the keys that it may look at (positions of a tree, not of a line). A step to other beams
moves rows of that mask and no keys.

Shapes: B users, W beams, M children of a node, V tokens, N items, L codes of an item, P positions
read so far, n items of the longest history of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.generative.trie import CodeTrie
from baselines.sequence.padding import row_groups
from baselines.settings import GenerativeSettings
from recformer.data.batches import EvalBatch
from recformer.data.collators import EvalExample, eval_batch
from recformer.evaluation.ranks import Pairs, TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.recommender import Recommender
from recformer.evaluation.top_items import top_items
from recformer.files import UserError

START = 0  # token that an item is written after, and padding; codes have tokens from 1 on
NO_ITEM = -1  # pads histories, and lists of generated items that have come to an end
FIRST_USER = -2  # before a history, the user of token 0; that of token 1 is -3, and so on
ITEMS_AT_ONCE = 128  # of `score_items`, for each user of the batch
# What a further call of the network costs, in items of padding.
CALL_COST = {"cpu": 128}
CALL_COST_ELSEWHERE = 4096


@dataclass(frozen=True)
class Read:
    """State of a decoder: the history's positions, if any, and a tree of written codes.

    Attributes:
        keys, values: of each layer, (B, heads, P, head size).
        visible: bool (B, W, P), the positions that each beam continues.
    """

    keys: list[Tensor]
    values: list[Tensor]
    visible: Tensor

    def grown(self, parents: Tensor) -> Tensor:
        """`visible` of new beams, each seeing what its parent saw and itself, (B, W, P + W).

        Args:
            parents: int64 (B, W), the beam that each new one continues.
        """
        before = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[2]))
        itself = torch.eye(parents.shape[1], dtype=torch.bool, device=parents.device)
        return torch.cat([before, itself.expand(len(parents), -1, -1)], dim=2)


@dataclass(frozen=True)
class Generated:
    """Items written for each user, the most likely first.

    Attributes:
        items: int64 (B, W), NO_ITEM where there are no more.
        log_probs: float32 (B, W), log-probability of the item's codes; -inf where there is no item.
    """

    items: Tensor
    log_probs: Tensor


@dataclass
class CodeUsers:
    """Users whose histories a model over codes has read.

    Searches and the scores of all items are made when they are first asked for, and kept.

    Attributes:
        logits: of the first code, (B, 1, V).
        read: the histories.
        seen: (rows, items), int64, every item of the histories.
        searches: items that must not come out, bool (B, N) or None for any, and what was found.
        scores: of all items, (B, N).
    """

    logits: Tensor
    read: Read
    seen: tuple[Tensor, Tensor]
    searches: list[tuple[Tensor | None, Generated]] = field(default_factory=list)
    scores: Tensor | None = None


@dataclass(frozen=True)
class CodeRanks(TargetRanks):
    """Ranks of the targets, and what the model says of their codes.

    Attributes:
        codes_right: int64 (B,), 0 .. L: the first `codes_right` codes of the best item are the
            target's.
        code_losses: float32 (B, L), cross-entropy of each code of the target after those before it,
            in nats.
    """

    codes_right: NDArray[np.int64]
    code_losses: NDArray[np.float32]


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, W, heads * head size) -> (B, heads, W, head size)."""
    return states.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """(B, heads, W, head size) -> (B, W, heads * head size)."""
    return states.transpose(1, 2).flatten(2)


class CodeRecommender(nn.Module, Recommender[Tensor, CodeUsers]):
    """A model over item codes; a subclass brings `start`, `step` and `training_loss`.

    They read the newest items of each history, oldest first, int64 (B, n), NO_ITEM at the end of
    shorter ones.

    Args:
        codes: integers (N, L), row i the codes of item i, all different.
        codebook_size: L numbers, how many codes each level may have; there is a token for each, so
            that items with other codes may be added later.
        num_beams: items generated for a user; 1 is greedy decoding.
        exact_rank: rank by the scores of all items in place of beam search.

    Raises:
        UserError: codes are not unique or beyond their level's size, or `num_beams` < 1; when
            loading a state, items had other codes at its training.
    """

    item_tokens: Tensor
    first_tokens: Tensor

    def __init__(
        self,
        codes: ArrayLike,
        codebook_size: Sequence[int],
        num_beams: int = GenerativeSettings.num_beams,
        exact_rank: bool = GenerativeSettings.exact_rank,
    ) -> None:
        super().__init__()
        array = np.asarray(codes)
        self.trie = CodeTrie(array)
        sizes, needed = np.array(codebook_size), array.max(axis=0) + 1
        if sizes.shape != needed.shape or (sizes < needed).any():
            raise UserError(
                f"codebook_size is {sizes.tolist()}, but the items' codes need {needed.tolist()}"
            )
        if num_beams < 1:
            raise UserError(f"num_beams is {num_beams}, expected at least 1")
        self.num_beams = num_beams
        self.exact_rank = exact_rank
        first_tokens = START + 1 + np.cumsum(sizes) - sizes  # (L,)
        self.num_tokens = START + 1 + int(sizes.sum())
        tokens = torch.from_numpy(array.astype(np.int64) + first_tokens)
        self.register_buffer("item_tokens", tokens)  # (N, L)
        self.register_buffer("first_tokens", torch.from_numpy(first_tokens), persistent=False)

    @abstractmethod
    def start(self, history: Tensor) -> tuple[Tensor, Read]:
        """Logits of the first code, (B, 1, V), after histories (B, n)."""

    @abstractmethod
    def step(self, read: Read, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Read]:
        """Logits of the next code, (B, W, V), of beams that add a token to one of those before.

        Args:
            read: of the step before; it is left as it is.
            parents: int64 (B, W), the beam of the step before that each continues.
            tokens: int64 (B, W), what each adds.
        """

    def losses_of(self, codes: Tensor) -> dict[str, Tensor]:
        """What `training_loss` returns.

        Args:
            codes: cross-entropy of codes, (P, L) of P items.

        Returns:
            `loss`, the mean of all, and `code_loss@1` .. `code_loss@L`, those of the levels; nats.
        """
        levels = enumerate(codes.detach().mean(0).unbind(), start=1)
        return {"loss": codes.mean()} | {f"code_loss@{level}": loss for level, loss in levels}

    def history_tokens(self, items: Tensor) -> Tensor:
        """Tokens of padded items, int64 (B, n) -> (B, n * L); START where there is no item."""
        tokens = self.item_tokens[items.clamp(min=0)]  # (B, n, L)
        return tokens.masked_fill(items[..., None] == NO_ITEM, START).flatten(1)

    @torch.no_grad()
    def generate(self, history: Tensor, excluded: Tensor | None = None) -> Generated:
        """Beam search over the items.

        Every beam is the beginning of at least one item. With as many beams as there are items the
        result is the exact ranking.

        Args:
            history: int64 (B, n).
            excluded: bool (B, N), items that must not come out. No beam is spent on beginnings of
                such items alone, so that a user gets as many items as there are beams.
        """
        return self._search(*self.start(history), excluded)

    def _search(self, logits: Tensor, read: Read, excluded: Tensor | None) -> Generated:
        trie = self.trie
        opened = None if excluded is None else trie.open_nodes(excluded)
        nodes = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)  # (B, 1)
        scores = torch.zeros(nodes.shape, device=logits.device)
        for level in range(trie.num_levels):
            children, real = trie.children_of(nodes, level)  # (B, W, M)
            tokens = trie.codes[children] + self.first_tokens[level]
            longer = scores[..., None] + logits.float().log_softmax(-1).gather(2, tokens)
            longer.masked_fill_(~real, -torch.inf)
            if opened is not None:
                place = (children - trie.level_starts[level + 1]).flatten(1)
                is_open = opened[level].gather(1, place).view_as(children)
                longer.masked_fill_(~is_open, -torch.inf)
            num_beams = min(self.num_beams, longer[0].numel(), trie.num_nodes(level + 1))
            scores, place = longer.flatten(1).topk(num_beams)  # (B, W)
            nodes = children.flatten(1).gather(1, place)
            if level < trie.num_levels - 1:
                tokens = tokens.flatten(1).gather(1, place)
                logits, read = self.step(read, place // children.shape[2], tokens)
        # With fewer items than beams, padding fills the rest.
        return Generated(trie.items_of(nodes).masked_fill(scores == -torch.inf, NO_ITEM), scores)

    @torch.no_grad()
    def score_items(self, history: Tensor) -> Tensor:
        """Log-probability of every item for every user, float32 (B, N), by teacher forcing.

        Prefixes are read once for all items below them, some items at a time.
        """
        return self._score(*self.start(history))

    def _score(self, logits: Tensor, root: Read) -> Tensor:
        trie = self.trie
        num_users, num_items = len(logits), len(trie.items)
        first = logits.float().log_softmax(-1)
        scores = torch.empty(num_users, num_items, device=logits.device)
        ends = trie.level_starts[-1]
        for begin in range(trie.level_starts[-2], ends, ITEMS_AT_ONCE):
            path = [torch.arange(begin, min(begin + ITEMS_AT_ONCE, ends), device=scores.device)]
            while len(path) < trie.num_levels:
                path.append(trie.parents_of(path[-1]).unique())
            above = torch.zeros(1, dtype=torch.int64, device=scores.device)  # the root
            sums, log_probs, read = scores.new_zeros(num_users, 1), first, root
            for level, nodes in enumerate(reversed(path)):  # nodes (W,) of level + 1
                parents = torch.searchsorted(above, trie.parents_of(nodes))
                tokens = trie.codes[nodes] + self.first_tokens[level]
                sums = sums[:, parents] + log_probs[:, parents, tokens]  # (B, W)
                if level < trie.num_levels - 1:
                    logits, read = self.step(
                        read, parents.expand(num_users, -1), tokens.expand(num_users, -1)
                    )
                    log_probs = logits.float().log_softmax(-1)
                above = nodes
            scores[:, trie.items_of(nodes)] = sums
        return scores

    @torch.no_grad()
    def code_losses(self, users: CodeUsers, items: Tensor) -> Tensor:
        """Cross-entropy of the codes of one item (B,) a user, each after those before it.

        Returns:
            float32 (B, L), nats; the sum of a row is less the item's log-probability.
        """
        tokens, logits, read = self.item_tokens[items], users.logits, users.read
        same = torch.zeros_like(tokens[:, :1])
        losses = []
        for level in range(self.trie.num_levels):
            losses.append(code_loss(logits[:, 0], tokens[:, level]))
            if level < self.trie.num_levels - 1:
                logits, read = self.step(read, same, tokens[:, level : level + 1])
        return torch.stack(losses, dim=1)

    @torch.no_grad()
    def read(self, history: Tensor, seen: Pairs) -> CodeUsers:
        rows, items = (torch.as_tensor(side, device=history.device) for side in seen)
        return CodeUsers(*self.start(history), (rows, items))

    @torch.no_grad()
    def rank(self, users: CodeUsers, targets: Tensor, filter_seen: bool) -> CodeRanks:
        """Rank the targets among the generated items, or with `exact_rank` among all.

        A target that is not generated has the last rank, the number of candidates. With
        `filter_seen` items of the history are not generated, the target always may be.
        """
        excluded = self._seen(users) if filter_seen else None
        num_candidates = torch.full_like(targets, len(self.trie.items))
        if excluded is not None:
            excluded.scatter_(1, targets[:, None], False)
            num_candidates -= excluded.sum(1)
        if self.exact_rank:
            scores = self._all_scores(users)
            ranks = count_ranks(scores, targets, users.seen if filter_seen else None)
            if excluded is not None:
                scores = scores.masked_fill(excluded, -torch.inf)
            best = scores.argmax(1)
        else:
            generated = self._generated(users, excluded)
            ranks = ranks_among(generated, targets, num_candidates)
            best = generated.items[:, 0]
        agree = self.item_tokens[best] == self.item_tokens[targets]  # (B, L)
        agree &= (best != NO_ITEM)[:, None]
        codes_right = agree.cumprod(1).sum(1).cpu().numpy()
        losses = self.code_losses(users, targets).cpu().numpy()
        return CodeRanks(ranks.above, ranks.tied, ranks.num_candidates, codes_right, losses)

    @torch.no_grad()
    def rank_among(
        self, users: CodeUsers, targets: Tensor, candidates: NDArray[np.int64]
    ) -> TargetRanks:
        """Rank the targets among items (B, K) of each user's own, by their scores."""
        return count_ranks_among(self._all_scores(users), targets, candidates)

    @torch.no_grad()
    def recommend(self, users: CodeUsers, k: int, filter_seen: bool) -> NDArray[np.int64]:
        """The k best items, best first, int64 (B, k); NO_ITEM behind them.

        Without `exact_rank` they are the generated ones, no more than there are beams.
        """
        if self.exact_rank:
            seen = users.seen if filter_seen else None
            return top_items(self._all_scores(users), k, seen)[0]
        generated = self._generated(users, self._seen(users) if filter_seen else None)
        items = generated.items[:, :k].cpu().numpy()
        return np.pad(items, ((0, 0), (0, k - items.shape[1])), constant_values=NO_ITEM)

    def _seen(self, users: CodeUsers) -> Tensor:
        """Mask of the items of the histories, bool (B, N)."""
        size = len(users.logits), len(self.trie.items)
        seen = torch.zeros(size, dtype=torch.bool, device=users.logits.device)
        seen[users.seen] = True
        return seen

    def _generated(self, users: CodeUsers, excluded: Tensor | None) -> Generated:
        for before, generated in users.searches:
            if before is excluded or (
                before is not None and excluded is not None and torch.equal(before, excluded)
            ):
                return generated
        generated = self._search(users.logits, users.read, excluded)
        users.searches.append((excluded, generated))
        return generated

    def _all_scores(self, users: CodeUsers) -> Tensor:
        if users.scores is None:
            users.scores = self._score(users.logits, users.read)
        return users.scores

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "item_tokens")
        if saved is not None:
            # Items may have been added since; those that were there must not have moved.
            if not torch.equal(self.item_tokens[: len(saved)].cpu(), saved.cpu()):
                raise UserError(
                    "the model was trained with other codes of the items: give the semantic ids of "
                    "its training, to which new items may have been added at the end"
                )
            state_dict[prefix + "item_tokens"] = self.item_tokens
        super()._load_from_state_dict(state_dict, prefix, *args)


def ranks_among(generated: Generated, targets: Tensor, num_candidates: Tensor) -> TargetRanks:
    """Place of each target among the generated items, the last of all where it is not there.

    Args:
        targets: int64 (B,).
        num_candidates: int64 (B,).
    """
    hit = generated.items == targets[:, None]  # (B, W)
    found = hit.any(1)
    score = generated.log_probs.masked_fill(~hit, -torch.inf).amax(1, keepdim=True)
    above = torch.where(found, (generated.log_probs > score).sum(1), num_candidates - 1)
    tied = torch.where(found, (generated.log_probs == score).sum(1) - 1, 0)
    return TargetRanks(above.cpu().numpy(), tied.cpu().numpy(), num_candidates.cpu().numpy())


def code_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy (P,) of tokens (P,) under logits (P, V), float32, in nats."""
    return F.cross_entropy(logits.float(), tokens, reduction="none")


def by_length(items: Tensor) -> list[Tensor]:
    """Padded items (B, n) in groups of similar lengths: rows of each, int64, the shortest first.

    The host waits once for a device, for the lengths.
    """
    lengths = (items != NO_ITEM).sum(1).cpu().numpy()
    cost = CALL_COST.get(items.device.type, CALL_COST_ELSEWHERE)
    return [torch.from_numpy(rows).to(items.device) for rows in row_groups(lengths, cost)]


def without_padding(items: Tensor) -> Tensor:
    """Padded items (B, n) up to the end of the longest row, (B, m)."""
    return items[:, : int((items != NO_ITEM).any(0).sum())]


def pad_items(sequences: Sequence[np.ndarray], max_items: int) -> Tensor:
    """The newest `max_items` of each sequence, oldest first, filled with NO_ITEM: int64 (B, n)."""
    kept = [torch.from_numpy(np.asarray(s[-max_items:], dtype=np.int64)) for s in sequences]
    return nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=NO_ITEM)


def with_users(history: Tensor, user_ids: Sequence[int], user_tokens: int) -> Tensor:
    """Histories (B, n) with the user's token before them, (B, 1 + n); as they are without tokens.

    Args:
        history: padded items.
        user_ids: B of them.
        user_tokens: so many tokens are shared by all users, each has that of its id modulo them.
    """
    if not user_tokens:
        return history
    users = FIRST_USER - torch.tensor(user_ids).remainder(user_tokens)
    return torch.cat([users[:, None], history], dim=1)


class CodeHistoryCollator:
    """Evaluation batches of models over codes: the newest `max_items` of each history.

    Args:
        max_items: see above.
        user_tokens: see `with_users`.
    """

    def __init__(self, max_items: int, user_tokens: int = 0) -> None:
        self.max_items = max_items
        self.user_tokens = user_tokens

    def __call__(self, examples: Sequence[EvalExample]) -> EvalBatch[Tensor]:
        history = pad_items([example.items for example in examples], self.max_items)
        users = [example.user_id for example in examples]
        return eval_batch(examples, with_users(history, users, self.user_tokens))
