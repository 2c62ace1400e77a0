"""A head that knows its catalogue: items and users from the encoder's vectors of single items.

The encoder reads every item alone, once; what is trained on top of its vectors costs minutes. With
e_i the encoder's vector of item i, b_i the bag of its text's tokens and h the history, newest
first (docs/method.md has the reasons):

    x_i = n([n(W (n(e_i) - m)), s n(B^T b_i)])                      text: whitening and a bag
    v_i = n(x_i + d_i), |d_i| <= 1, 0 for items nobody bought       item: text and a learned offset
    u   = n(sum_a exp(r_a) (v_h[a] + f_h[a]))                       user: newer items weigh more
    s(u, i) = cos(u, v_i),  for i in h:  g cos(u, v_i) + t_age      score: a term for known items

n(.) divides by the length; f is a second offset, bounded as d is, and 0 unless `next_offsets` asks
for it. Trained by the softmax over all items that were ever bought, every item of a user's history
being a target behind those before it. Items that nobody bought are no negatives, and items bought
c < 20 times count as sqrt(c / 20) of one: they are seldom or never a target, and would otherwise be
pushed away from where their texts put them.

Shapes: N items, M any items, H encoder, G bag, D = H + G, V vocabulary, S tokens of all bags,
P histories, W items of all histories, U distinct items of all histories.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recformer.config import RecformerConfig
from recformer.data.batches import TrainBatch
from recformer.data.histories import Histories
from recformer.data.items import TokenizedItems
from recformer.evaluation.additions import Additions
from recformer.evaluation.recommender import VectorRecommender
from recformer.files import UserError
from recformer.models.encoder import RecformerModel, RecformerPreTrainedModel
from recformer.models.losses import mean_over_processes, softmax_loss_with_terms

VALUE = 2  # token type of an attribute's value
AGES = 6  # ages told apart in the term for items of the history, the last one for all older items
SMALLEST = 1e-3  # of the largest variance: directions below are not blown up by whitening
FIRST_DECAY = 0.6  # weight of an item beside the next newer one, before training
FIRST_FACTOR = 0.5  # of the score of an item of the history, before training
FIRST_TEMPERATURE = 0.07


@dataclass(frozen=True)
class HeadOptions:
    """Parts of the head; each can be left out.

    Attributes:
        max_history: newest items read of a history.
        whiten: decorrelate the encoder's vectors over the catalogue.
        bag_size: G, size of the trained token bag; 0: none.
        offsets: learn an offset an item.
        next_offsets: learn a second offset an item, for its place in a history: what comes after it
            where the order of a sequence says so.
        offset_dropout: share of items whose offset is left out of a training step.
        recency: newer items weigh more; otherwise all alike.
        history_term: items of the history have a score of their own.
        spare_unbought: items that nobody bought are no negatives.
        spare_rare: items of c training interactions, fewer than these, count as
            sqrt(c / spare_rare) of a negative; 0 or 1: all alike.
    """

    max_history: int = 20
    whiten: bool = True
    bag_size: int = 384
    offsets: bool = True
    next_offsets: bool = False
    offset_dropout: float = 0.5
    recency: bool = True
    history_term: bool = True
    spare_unbought: bool = True
    spare_rare: int = 20

    def __post_init__(self) -> None:
        if self.max_history < 1:
            raise UserError(f"max_history is {self.max_history}, expected at least 1")
        if self.bag_size < 0:
            raise UserError(f"bag_size is {self.bag_size}, expected 0 or more")
        if not 0 <= self.offset_dropout < 1:
            raise UserError(f"offset_dropout is {self.offset_dropout}, expected from 0 to below 1")
        if self.spare_rare < 0:
            raise UserError(f"spare_rare is {self.spare_rare}, expected 0 or more")

    @classmethod
    def of(cls, config: RecformerConfig) -> HeadOptions:
        """The options in `config.head`.

        Raises:
            UserError: the configuration is that of a model without a head.
        """
        values = getattr(config, "head", None)
        if not isinstance(values, Mapping):
            raise UserError("the configuration has no head: the model was made by another method")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """For `config.head`."""
        return asdict(self)


@dataclass(frozen=True)
class TokenBags:
    """Counts of tokens in the texts of M items.

    Attributes:
        tokens: (S,) int64 ids, each once an item.
        counts: (S,) float32.
        offsets: (M + 1,) int64; item i has the entries `offsets[i]:offsets[i + 1]`.
    """

    tokens: Tensor
    counts: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to(self, *args: Any, **kwargs: Any) -> TokenBags:
        """The same on another device."""
        return TokenBags(*(t.to(*args, **kwargs) for t in vars(self).values()))


def token_bags(store: TokenizedItems) -> TokenBags:
    """Bags of the value tokens of all items of a store; attribute names say nothing."""
    values = np.asarray(store.token_type_ids) == VALUE
    tokens = np.asarray(store.input_ids)[values].astype(np.int64)
    owner = np.repeat(np.arange(len(store)), store.lengths)[values]
    size = int(tokens.max()) + 1 if len(tokens) else 1
    keys, counts = np.unique(owner * size + tokens, return_counts=True)
    owner, tokens = np.divmod(keys, size)
    ends = np.cumsum(np.bincount(owner, minlength=len(store)))
    return TokenBags(
        torch.from_numpy(tokens),
        torch.from_numpy(counts.astype(np.float32)),
        torch.from_numpy(np.append(0, ends)),
    )


def whitening(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (H,) and matrix (H, H) that decorrelate vectors (M, H) (ZCA, symmetric).

    Directions of little variance are damped rather than blown up; float64 inside.
    """
    vectors = F.normalize(vectors.double(), dim=-1)
    mean = vectors.mean(dim=0)
    centred = vectors - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    variances = variances.clamp(min=0)
    scales = (variances + SMALLEST * variances.max().clamp(min=1e-12)).rsqrt()
    return mean.float(), (directions * scales @ directions.T).float()


class CatalogueHead(nn.Module):
    """Vectors of items and users, and the term for items of the history; see the module.

    Args:
        config: `hidden_size`, `vocab_size`, `item_num` and `head` are read.
    """

    mean: Tensor
    whitening: Tensor
    idf: Tensor
    bought: Tensor

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__()
        self.options = options = HeadOptions.of(config)
        hidden, bag = config.hidden_size, options.bag_size
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("whitening", torch.eye(hidden))
        self.register_buffer("bought", torch.zeros(config.item_num, dtype=torch.bool))
        if bag:
            self.register_buffer("idf", torch.ones(config.vocab_size))
            self.bag = nn.Parameter(torch.randn(config.vocab_size, bag) * bag**-0.5)
            self.bag_scale = nn.Parameter(torch.ones(()))
        if options.offsets:
            self.offset = nn.Parameter(torch.zeros(config.item_num, hidden + bag))
        if options.next_offsets:
            self.next_offset = nn.Parameter(torch.zeros(config.item_num, hidden + bag))
        decay = math.log(FIRST_DECAY) if options.recency else 0.0
        weights = decay * torch.arange(options.max_history)
        self.log_recency = nn.Parameter(weights, requires_grad=options.recency)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(FIRST_TEMPERATURE)))
        if options.history_term:
            self.history_factor = nn.Parameter(torch.tensor(FIRST_FACTOR))
            self.history_bias = nn.Parameter(torch.zeros(AGES))
        self._log_weights: Tensor | None = None  # (N,) of items as negatives; for training alone

    @torch.no_grad()
    def fit(self, vectors: Tensor, bags: TokenBags, interactions: Tensor) -> None:
        """Set the parts that are not trained: whitening, rarity of tokens, what was bought.

        Args:
            vectors: (N, H) of the encoder.
            bags: of the N items.
            interactions: (N,) int, of each item in training sequences.
        """
        if self.options.whiten:
            mean, matrix = whitening(vectors)
            self.mean.copy_(mean)
            self.whitening.copy_(matrix)
        if self.options.bag_size:
            found = torch.bincount(bags.tokens, minlength=len(self.idf)).float()
            self.idf.copy_(torch.log((1 + len(bags)) / (1 + found)) + 1)  # smooth, as scikit-learn
        self.bought.copy_(interactions > 0)
        rare = max(self.options.spare_rare, 1)
        weights = (interactions.clamp(min=1, max=rare) / rare).sqrt()
        if self.options.spare_unbought:
            weights = weights * self.bought
        self._log_weights = weights.log()  # -inf: no negative

    def text_vectors(self, vectors: Tensor, bags: TokenBags) -> Tensor:
        """(M, D) of length 1, from the encoder's vectors (M, H) and the token bags of any items."""
        text = F.normalize(vectors.float(), dim=-1)
        if self.options.whiten:
            text = F.normalize((text - self.mean) @ self.whitening, dim=-1)
        if not self.options.bag_size:
            return text
        weights = bags.counts * self.idf[bags.tokens]
        bag = F.embedding_bag(
            bags.tokens, self.bag, bags.offsets[:-1], mode="sum", per_sample_weights=weights
        )
        bag = F.normalize(bag, dim=-1) * self.bag_scale
        return F.normalize(torch.cat([text, bag], dim=-1), dim=-1)

    def item_vectors(self, text: Tensor) -> Tensor:
        """(N, D) of length 1: the catalogue's text vectors (N, D) with the learned offsets."""
        if not self.options.offsets:
            return text
        return F.normalize(text + self._bounded(self.offset, self.bought), dim=-1)

    def _bounded(self, offsets: Tensor, kept: Tensor) -> Tensor:
        """Offsets (M, D) of length 1 at most, 0 where they are not to be `kept` (M,); in training a
        share of the others is left out."""
        offsets = offsets / offsets.norm(dim=1, keepdim=True).clamp(min=1)
        if self.training and self.options.offset_dropout:
            kept = kept & (torch.rand(len(kept), device=kept.device) >= self.options.offset_dropout)
        return offsets * kept[:, None]

    def user_vectors(
        self, histories: Histories, table: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """(P, D) of length 1.

        Args:
            histories: name items by their place in the table.
            table: (M, D) vectors of items.
            rows: (M,) int64, which items of the trained catalogue they are, -1 for others; None:
                the table is that of the catalogue.
        """
        weights = self.log_recency.exp()[histories.ages]

        def summed(items: Tensor, vectors: Tensor) -> Tensor:
            starts = histories.offsets[:-1]
            return F.embedding_bag(items, vectors, starts, mode="sum", per_sample_weights=weights)

        users = summed(histories.items, table)
        if self.options.next_offsets:
            places, items = histories.items.unique(return_inverse=True)
            numbers = places if rows is None else rows.to(places.device)[places]
            trained = (numbers >= 0) & (numbers < len(self.bought))
            numbers = numbers * trained
            kept = self.bought[numbers] & trained
            users = users + summed(items, self._bounded(self.next_offset[numbers], kept))
        return F.normalize(users, dim=-1)

    def history_additions(self, histories: Histories, cosines: Tensor) -> Tensor:
        """Terms added to the cosines (U,) of `histories.distinct`; zeros without that part."""
        return self.addition(cosines, histories.newest)

    def addition(self, cosines: Tensor, newest: Tensor) -> Tensor:
        """Terms added to cosines (U,) of items that histories hold at ages `newest` (U,)."""
        if not self.options.history_term:
            return torch.zeros_like(cosines)
        return (self.history_factor - 1) * cosines + self.history_bias[newest.clamp(max=AGES - 1)]

    def loss(self, histories: Histories, labels: Tensor, table: Tensor) -> Tensor:
        """Mean cross-entropy of the labels (P,) among all items (N, D), a float32 scalar.

        Raises:
            UserError: `fit` was not called.
        """
        if self._log_weights is None:
            raise UserError("it is not known how often items were bought: call fit first")

        def rescored(cosines: Tensor, places: Tensor) -> Tensor:
            return cosines + self.addition(cosines, histories.newest[places])

        return softmax_loss_with_terms(
            self.user_vectors(histories, table),
            table,
            labels,
            (histories.rows, histories.distinct),
            rescored,
            scale=torch.exp(-self.log_temperature),
            log_weights=self._log_weights.to(table.device),
        )


class RecformerForCatalogue(RecformerPreTrainedModel, VectorRecommender[Histories]):
    """A Recformer, frozen, with a `CatalogueHead`: the method `head` of finetuning.

    The item table `item_embedding` holds the final vectors (N, D) of the catalogue; a folder that
    `save_pretrained` wrote recommends without encoding anything.

    Args:
        config: as for `RecformerModel`, with `head` (`HeadOptions.as_dict`) and `item_num`.
    """

    # Few numbers that steer everything learn faster than the many.
    learning_rate_factors: ClassVar[dict[str, float]] = {
        f"head.{name}": 10.0
        for name in (
            "bag_scale",
            "log_recency",
            "log_temperature",
            "history_factor",
            "history_bias",
        )
    }

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__(config)
        self.longformer = RecformerModel(config).requires_grad_(False)
        self.head = CatalogueHead(config)
        size = config.hidden_size + self.head.options.bag_size
        self.item_embedding = nn.Embedding(config.item_num, size).requires_grad_(False)
        self._vectors: Tensor | None = None  # of the encoder
        self._bags: TokenBags | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, CatalogueHead):  # which starts as its own constructor says
            super()._init_weights(module)

    @property
    def knows_catalogue(self) -> bool:
        """Whether `set_catalogue` was called."""
        return self._vectors is not None

    def set_catalogue(self, vectors: Tensor, bags: TokenBags) -> None:
        """Give the texts of all items, which training and `refresh_table` need.

        Args:
            vectors: (N, H) of the encoder.
            bags: of the N items.

        Raises:
            UserError: another number of items, or another size of vectors.
        """
        expected = (self.config.item_num, self.config.hidden_size)
        if tuple(vectors.shape) != expected or len(bags) != len(vectors):
            raise UserError(
                f"vectors of shape {tuple(vectors.shape)} and {len(bags)} token bags, expected "
                f"{expected} and {expected[0]}"
            )
        self._vectors, self._bags = vectors, bags

    def _catalogue_vectors(self) -> Tensor:
        """Item vectors (N, D) as the weights stand now."""
        if self._vectors is None or self._bags is None:
            raise UserError("there are no texts of items yet: call set_catalogue first")
        device = self.item_embedding.weight.device
        self._vectors, self._bags = self._vectors.to(device), self._bags.to(device)
        return self.head.item_vectors(self.head.text_vectors(self._vectors, self._bags))

    @torch.no_grad()
    def refresh_table(self) -> None:
        """Write the item vectors of today's weights, without dropout, to `item_embedding`."""
        training = self.head.training
        self.head.eval()
        with torch.autocast(self.device.type, enabled=False):
            self.item_embedding.weight.copy_(self._catalogue_vectors())
        self.head.train(training)

    def training_loss(self, batch: TrainBatch[Histories]) -> Tensor:
        """Loss of a batch of `NextItemCollator`; with several processes, of all their batches."""
        loss = self.head.loss(batch.history, batch.labels, self._catalogue_vectors())
        return mean_over_processes(loss, len(batch.labels))

    def user_vectors(self, history: Histories) -> Tensor:
        """Vectors (P, D) of histories of catalogue items."""
        table = self.item_embedding.weight
        with torch.autocast(table.device.type, enabled=False):
            return self.head.user_vectors(history, table)

    def item_vectors(self) -> Tensor:
        """The item table (N, D)."""
        return self.item_embedding.weight

    def history_terms(self, history: Histories, vectors: Tensor) -> Additions:
        """Terms added to the cosines of items of the histories."""
        known = self.item_embedding.weight[history.distinct]
        with torch.autocast(vectors.device.type, enabled=False):
            cosines = (vectors[history.rows].double() * known.double()).sum(dim=-1)
            added = self.head.history_additions(history, cosines)
        return history.rows, history.distinct, added
