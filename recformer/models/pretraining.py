"""Pretraining: contrastive loss between sequences and their next items, plus MLM (paper 2.3).

Side a holds sequences of items, side b the item that follows each of them.

Shapes: B pairs, G pairs of all processes, L padded length, T packed tokens, M masked tokens,
V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from recformer.config import RecformerConfig
from recformer.data.batches import NO_LABEL, PairBatch
from recformer.files import UserError
from recformer.models.encoder import RecformerModel, RecformerPreTrainedModel
from recformer.models.losses import contrastive_scores
from recformer.packing import PackedTokens

# Masked tokens go through the head in a round number, as tokens through the encoder: see there.
MASKED_MULTIPLE = 128


class RecformerLMHead(nn.Module):
    """Scores of every vocabulary entry at a token, as RoBERTa's head."""

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # published: the decoder has a weight of its own, not the word embeddings.
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, H) -> (M, V)."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden))))

    def _tie_weights(self) -> None:
        """Called by transformers 4 after loading, which may have put two tensors in their place."""
        self.decoder.bias = self.bias


@dataclass
class RecformerPretrainingOutput(ModelOutput):
    """Output of `RecformerForPretraining`.

    Attributes:
        loss: scalar, contrastive + mlm_weight * (MLM of a + MLM of b).
        logits: (B, G) float32; G = B in one process.
        cl_correct_num: int64, see `PairLosses.num_correct`.
        cl_total_num: B.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cl_correct_num: Tensor | None = None
    cl_total_num: int | None = None


@dataclass(frozen=True)
class PairLosses:
    """Losses of a batch of pairs, from `RecformerForPretraining.forward_packed`.

    Attributes:
        loss: scalar, contrastive + mlm_weight * (MLM of a + MLM of b).
        parts: the losses that were added up, unweighted: `contrastive`, and `mlm_a` and `mlm_b`
            where there are masked ids.
        logits: (B, G) float32 cosine similarity / temp of every a with every b of all processes.
        labels: (B,) the column of each row's own b.
        vectors: (B, H) of side a.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor
    labels: Tensor
    vectors: Tensor

    @property
    def num_correct(self) -> Tensor:
        """Rows whose own b is above every other, int64; one that ties is not."""
        own = self.logits.gather(1, self.labels[:, None])
        return ((self.logits >= own).sum(dim=1) == 1).sum()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gathered(values: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks: (B, ...) -> (W * B, ...)."""
    if not _several():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """`_gathered`, with the gradients that all processes have for this one's rows on the way back.

    published: gathered rows carried no gradient, so the loss depended on the number of GPUs.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        return _gathered(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not _several():
            return grad
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.size
        return grad[first : first + ctx.size]


def _ignoring_it(_: Tensor, call: Callable[[], Any]) -> Any:
    return call()


def _check_pairs(a: PackedTokens, b: PackedTokens) -> None:
    if a.batch_size != b.batch_size:
        raise UserError(
            f"side a has {a.batch_size} sequences and side b {b.batch_size}: they are pairs"
        )


def _mlm_counts(true_ids: dict[str, Tensor]) -> Tensor:
    """Predicted tokens of each side, int64 (sides,)."""
    return torch.stack([(side != NO_LABEL).sum() for side in true_ids.values()])


def _mlm_means(sums: Tensor, true_ids: dict[str, Tensor]) -> dict[str, Tensor]:
    """MLM loss of each side from the sums (sides,) over this process's masked tokens.

    Divided by the mean count of all processes, so that the mean of their losses is that of all.
    """
    if not true_ids:
        return {}
    counts, world = _mlm_counts(true_ids), 1
    if _several():
        world = dist.get_world_size()
        dist.all_reduce(counts)
    return dict(zip(true_ids, (sums * world / counts.clamp(min=1)).unbind(), strict=True))


class RecformerForPretraining(RecformerPreTrainedModel):
    """Recformer in pretraining: the encoder and a masked-language-model head (paper, section 2.3).

    A batch holds pairs of a history and the item that follows it. The loss is the contrastive loss
    between both sides plus `config.mlm_weight` times the masked-language-model loss of each.

    Args:
        config: configuration; `temp` and `mlm_weight` count here.
    """

    # transformers 5 wants to know which key is a copy of which, transformers 4 which are copies.
    _tied_weights_keys = (
        {"lm_head.decoder.bias": "lm_head.bias"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.decoder.bias"]
    )

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__(config)
        self.longformer = RecformerModel(config)
        self.lm_head = RecformerLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> None:
        """None, so that transformers ties nothing to the word embeddings."""
        return

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Both names of the bias, whatever `config.tie_word_embeddings` says (transformers 5)."""
        return {"lm_head.decoder.bias": "lm_head.bias"}

    def forward_packed(
        self,
        a: PackedTokens,
        b: PackedTokens,
        mlm_a: tuple[Tensor, Tensor] | None = None,
        mlm_b: tuple[Tensor, Tensor] | None = None,
        target_ids: Tensor | None = None,
    ) -> PairLosses:
        """Losses of a packed batch of pairs; all its inputs go through the encoder in one pass.

        In a process group every process brings equally many pairs: the b of all of them are
        negatives, with their gradients, and masked tokens are averaged over all of them, so that
        the mean of the processes' losses, and of their gradients, is that of one big batch.

        Args:
            a, b: B sequences each.
            mlm_a, mlm_b: masked ids and true ids (-100 where nothing is predicted) of that side's
                tokens, (T,) int64 each; None: no MLM loss of that side.
            target_ids: (B,) items of side b; pairs with the same one are no negatives of each
                other. None: they are.

        Raises:
            UserError: sides of different sizes, or as `RecformerModel.encode`.
        """
        _check_pairs(a, b)
        masked = {
            name: (replace(side, input_ids=mlm[0]), mlm[1])
            for name, side, mlm in (("mlm_a", a, mlm_a), ("mlm_b", b, mlm_b))
            if mlm is not None
        }
        true_ids = {name: labels for name, (_, labels) in masked.items()}
        return self._pair_losses(*self._encoded(a, b, masked), true_ids, target_ids)

    def _pair_losses(
        self,
        vectors: Tensor,
        targets: Tensor,
        sums: Tensor,
        true_ids: dict[str, Tensor],
        target_ids: Tensor | None,
    ) -> PairLosses:
        """Losses of vectors (B, H) of both sides and of the sums of the MLM losses."""
        everyone = _Gather.apply(targets.float())
        ids = None if target_ids is None else _gathered(target_ids)
        first = dist.get_rank() * len(vectors) if _several() else 0
        logits = contrastive_scores(vectors, everyone, self.config.temp, ids, first)
        labels = torch.arange(first, first + len(vectors), device=logits.device)
        parts = {"contrastive": F.cross_entropy(logits, labels)} | _mlm_means(sums, true_ids)
        return PairLosses(self._weighted(parts), parts, logits, labels, vectors)

    def _mlm_sums(
        self, hidden: Tensor, true_ids: dict[str, Tensor], counts: list[int] | None
    ) -> Tensor:
        """Sums of the cross-entropies at the masked tokens of each side, (sides,).

        The head runs on no other tokens. A side without a masked token gives zero, with zero
        gradients.

        Args:
            hidden: (T, H) of the masked copies, side by side.
            true_ids: by side, -100 where nothing is predicted; T together.
            counts: predicted tokens of each side; None: asked for, which waits for the device.
        """
        labels = torch.cat(list(true_ids.values()))
        predicted = labels != NO_LABEL
        if counts is None:
            counts = _mlm_counts(true_ids).tolist()
        if labels.device.type == "cpu":
            places = predicted.nonzero()[:, 0]
        else:  # the same, without waiting to know how many there are
            places = (~predicted).byte().argsort(stable=True)[: sum(counts)]
        rows = F.pad(places, (0, -len(places) % MASKED_MULTIPLE))
        scores = self.lm_head(hidden.index_select(0, rows))[: len(places)].float()  # (M, V)
        losses = F.cross_entropy(scores, labels.index_select(0, places), reduction="none")
        parts = losses.split(counts)
        return torch.stack([part.sum() for part in parts])

    def batch_losses(self, batch: PairBatch, at_once: int | None = None) -> PairLosses:
        """`forward_packed` on a batch; `at_once` as in `training_loss`."""
        vectors, targets, sums, true_ids = self._encoded_in_parts(batch, at_once)
        return self._pair_losses(
            torch.cat(vectors), torch.cat(targets), sums, true_ids, batch.target_ids
        )

    def training_loss(self, batch: PairBatch, at_once: int | None = None) -> dict[str, Tensor]:
        """The loss and its parts.

        Args:
            batch: the pairs.
            at_once: so many pairs go through the encoder at a time; None: all of them. Their
                activations are not kept: vectors alone are, and every part is computed again, from
                the same random state, when its gradient is there (gradient caching: Gao et al.
                2021, arXiv:2101.06983). Loss and gradients are those of the batch in one piece but
                for rounding and for what dropout draws; memory is that of one part, and 4 H bytes a
                vector.

        Raises:
            UserError: as `forward_packed`.
        """
        if at_once is None:
            losses = self.batch_losses(batch)
            return {"loss": losses.loss, **losses.parts}
        vectors, targets, sums, true_ids = self._encoded_in_parts(batch, at_once)
        parts = {"contrastive": self._contrastive(vectors, torch.cat(targets), batch.target_ids)}
        parts |= _mlm_means(sums, true_ids)
        return {"loss": self._weighted(parts), **parts}

    def _encoded_in_parts(
        self, batch: PairBatch, at_once: int | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor, dict[str, Tensor]]:
        """Vectors of both sides, part by part, the sums of the MLM losses, and all true ids."""
        _check_pairs(batch.a, batch.b)
        sides = {"mlm_a": batch.mlm_a, "mlm_b": batch.mlm_b}
        masked = {name: mlm for name, mlm in sides.items() if mlm is not None}
        true_ids = {name: mlm[1] for name, mlm in masked.items()}
        before = None
        if batch.masked_before is not None:
            before = dict(zip(sides, batch.masked_before, strict=True))
        if at_once is None:
            parts = [(batch.a, batch.b)]
        else:
            parts = list(zip(batch.a.split(at_once), batch.b.split(at_once), strict=True))
        starts, found, pairs = dict.fromkeys(sides, 0), [], 0
        for a, b in parts:
            counts = None
            if before is not None:
                ends = [pairs, pairs + a.batch_size]
                counts = [int(np.diff(before[name][ends])[0]) for name in masked]
            pairs += a.batch_size
            copies: dict[str, tuple[PackedTokens, Tensor]] = {}
            for name, mlm in masked.items():
                side = a if name == "mlm_a" else b
                tokens = slice(starts[name], starts[name] + side.num_tokens)
                starts[name] = tokens.stop
                copies[name] = (replace(side, input_ids=mlm[0][tokens]), mlm[1][tokens])
            if at_once is None:
                found.append(self._encoded(a, b, copies, counts))
            else:
                # The tensor says on which device random state and autocast are to be kept, which
                # `checkpoint` does not see in `PackedTokens`.
                encoded = partial(self._encoded, a, b, copies, counts)
                found.append(checkpoint(_ignoring_it, a.input_ids, encoded, use_reentrant=False))
        vectors, targets, sums = (list(each) for each in zip(*found, strict=True))
        return vectors, targets, torch.stack(sums).sum(dim=0), true_ids

    def _encoded(
        self,
        a: PackedTokens,
        b: PackedTokens,
        masked: dict[str, tuple[PackedTokens, Tensor]],
        counts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of both sides, (B, H) each, and the sums of the MLM losses of masked copies, of
        which `counts` tokens are to be predicted."""
        size = a.batch_size
        if not masked:
            pooled = self.longformer.encode(PackedTokens.cat([a, b]))
            return pooled[:size], pooled[size:], pooled.new_zeros(0)
        copies = [side for side, _ in masked.values()]
        hidden, pooled = self.longformer.encode_tokens(PackedTokens.cat([a, b, *copies]))
        begin = a.num_tokens + b.num_tokens
        true_ids = {name: labels for name, (_, labels) in masked.items()}
        sums = self._mlm_sums(hidden[begin:], true_ids, counts)
        return pooled[:size], pooled[size : 2 * size], sums

    def _contrastive(
        self, vectors: list[Tensor], targets: Tensor, target_ids: Tensor | None
    ) -> Tensor:
        """The contrastive loss of vectors of side a in parts, whose scores are not kept either.

        Args:
            vectors: B rows together.
            targets: (B, H) of side b.
            target_ids: as in `forward_packed`.
        """
        everyone = _Gather.apply(targets.float())
        ids = None if target_ids is None else _gathered(target_ids)
        first = dist.get_rank() * len(targets) if _several() else 0

        def summed(part: Tensor, place: int) -> Tensor:
            scores = contrastive_scores(part, everyone, self.config.temp, ids, place)
            labels = torch.arange(place, place + len(part), device=scores.device)
            return F.cross_entropy(scores, labels, reduction="sum")

        sums = []
        for part in vectors:
            sums.append(checkpoint(summed, part, first, use_reentrant=False))
            first += len(part)
        return torch.stack(sums).sum() / len(targets)

    def _weighted(self, parts: dict[str, Tensor]) -> Tensor:
        """contrastive + mlm_weight * (MLM of a + MLM of b), of those that are there."""
        weights = {"contrastive": 1.0, "mlm_a": self.config.mlm_weight}
        weights["mlm_b"] = self.config.mlm_weight
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def forward(
        self,
        input_ids_a: Tensor | None = None,
        attention_mask_a: Tensor | None = None,
        global_attention_mask_a: Tensor | None = None,
        token_type_ids_a: Tensor | None = None,
        item_position_ids_a: Tensor | None = None,
        mlm_input_ids_a: Tensor | None = None,
        mlm_labels_a: Tensor | None = None,
        input_ids_b: Tensor | None = None,
        attention_mask_b: Tensor | None = None,
        global_attention_mask_b: Tensor | None = None,
        token_type_ids_b: Tensor | None = None,
        item_position_ids_b: Tensor | None = None,
        mlm_input_ids_b: Tensor | None = None,
        mlm_labels_b: Tensor | None = None,
        head_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> RecformerPretrainingOutput | tuple:
        """The published forward pass over right-padded sides a and b.

        Args:
            input_ids_*: (B, L), as `RecformerModel.forward`, and so are attention_mask_*,
                global_attention_mask_*, token_type_ids_* and item_position_ids_*.
            mlm_input_ids_*: (B, L) masked ids; without them that side has no MLM loss.
            mlm_labels_*: (B, L) true ids, -100 where nothing is predicted.
            return_dict: False returns the tuple of the output's fields.
            head_mask, position_ids, output_attentions, output_hidden_states: refused.

        Raises:
            ValueError: as `RecformerModel.forward`, sides of different batch sizes, or masked ids
                without labels or the reverse.
        """
        refused = {
            "head_mask": head_mask,
            "position_ids": position_ids,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        for name, value in refused.items():
            if value is not None and value is not False:
                raise UserError(f"{name} is not supported")
        a, mlm_a = self._pack_side(
            "a",
            input_ids_a,
            attention_mask_a,
            global_attention_mask_a,
            token_type_ids_a,
            item_position_ids_a,
            mlm_input_ids_a,
            mlm_labels_a,
        )
        b, mlm_b = self._pack_side(
            "b",
            input_ids_b,
            attention_mask_b,
            global_attention_mask_b,
            token_type_ids_b,
            item_position_ids_b,
            mlm_input_ids_b,
            mlm_labels_b,
        )
        losses = self.forward_packed(a, b, mlm_a, mlm_b)
        output = RecformerPretrainingOutput(
            loss=losses.loss,
            logits=losses.logits,
            cl_correct_num=losses.num_correct,
            cl_total_num=a.batch_size,
        )
        return output.to_tuple() if return_dict is False else output

    def _pack_side(
        self,
        side: str,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        global_attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        item_position_ids: Tensor | None,
        mlm_input_ids: Tensor | None,
        mlm_labels: Tensor | None,
    ) -> tuple[PackedTokens, tuple[Tensor, Tensor] | None]:
        """One side's padded inputs as a packed batch, with its masked and true ids, (T,) each."""
        if input_ids is None or item_position_ids is None:
            missing = "input_ids" if input_ids is None else "item_position_ids"
            raise UserError(f"{missing}_{side} is required, of shape (batch, length)")
        if (mlm_input_ids is None) != (mlm_labels is None):
            raise UserError(f"mlm_input_ids_{side} and mlm_labels_{side} go together, got one")
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        packed = self.longformer.pack(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            item_position_ids=item_position_ids,
        )
        if mlm_input_ids is None or mlm_labels is None:
            return packed, None
        mask = attention_mask.bool()
        return packed, (mlm_input_ids[mask], mlm_labels[mask])
