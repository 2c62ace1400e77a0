"""The settings of each baseline: one dataclass a model.

Flags and their help, what is checked before any work, and what `best_model/config.json` and
`metrics.json` keep all follow from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from baselines.sequence.features import AGGREGATIONS
from baselines.sequence.item_table import KINDS
from baselines.sequence.objectives import OBJECTIVES_OF, check_goes_with, objective_named
from recformer.files import UserError
from recformer.training.arguments import flag

LOSSES = ("softmax", "sampled_softmax", "bce", "gbce", "bpr_max", "top1_max", "in_batch")
SOFTMAXES = ("softmax", "sampled_softmax", "in_batch")
TARGETS = ("one", "all")
WEIGHTINGS = ("tfidf", "bm25")


def _at_least(settings: Settings, least: int, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < least:
            raise UserError(f"--{name} {getattr(settings, name)}: must be at least {least}")


def _one_of(settings: Settings, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(settings, name)
    if value not in allowed:
        raise UserError(f"--{name} {value}: expected one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Settings:
    """Settings of a model.

    A field with a help text is a flag; a subclass that gives it another default need not repeat
    the text.

    Raises:
        UserError: a value that is not allowed, or values that do not go together.
    """

    def __post_init__(self) -> None:
        """Refuse values that would only fail later."""

    def as_dict(self) -> dict[str, Any]:
        """Names and values, as they are saved."""
        return asdict(self)


@dataclass(frozen=True)
class PopularitySettings(Settings):
    """Popularity has no settings."""


@dataclass(frozen=True)
class CooccurrenceSettings(Settings):
    """Settings of item co-occurrence."""

    decay: float = flag(
        0.6, "weight of an item against the next newer one, 0 for the last item alone"
    )
    history_factor: float = flag(
        1.0, "scores of items that the user has are multiplied by it, from 0 to 1"
    )

    def __post_init__(self) -> None:
        for name in ("decay", "history_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected from 0 to 1")


@dataclass(frozen=True)
class TextNeighboursSettings(CooccurrenceSettings):
    """Settings of text neighbours."""

    text_encoder: str | None = flag(
        None,
        "folder or hub id of a sentence encoder, mean-pooled, or of a Recformer; text_neighbours "
        "without one compares words",
    )
    weighting: str = flag("tfidf", f"of words, {' or '.join(WEIGHTINGS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, "weighting", WEIGHTINGS)


@dataclass(frozen=True)
class SknnSettings(Settings):
    """Settings of session kNN, S-KNN and V-SKNN."""

    neighbours: int = flag(100, "training sequences most like the history that count")

    def __post_init__(self) -> None:
        _at_least(self, 1, "neighbours")


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """Settings that every trained model has."""

    hidden_size: int = flag(128, "size of item vectors and hidden states")
    num_layers: int = flag(2, "transformer or recurrent layers")
    dropout: float = flag(0.2, "of embeddings, attention and feed-forward layers")
    max_length: int = flag(50, "newest items read of a sequence")

    def __post_init__(self) -> None:
        _at_least(self, 1, "hidden_size", "num_layers")
        _at_least(self, 2, "max_length")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: must be from 0 to below 1")


@dataclass(frozen=True)
class AttentionSettings(NetworkSettings):
    """Settings of models with attention."""

    num_heads: int = flag(2, "attention heads; of tiger --head_size wide each")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_heads")

    def check_heads(self) -> None:
        """Refuse heads that do not share the hidden states evenly."""
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"--hidden_size {self.hidden_size} does not divide by --num_heads {self.num_heads}"
            )


@dataclass(frozen=True)
class SequenceSettings(NetworkSettings):
    """Settings of models over sequences of item vectors."""

    loss: str = flag(
        "softmax",
        "softmax, sampled_softmax, bce, gbce, bpr_max, top1_max, or in_batch: softmax over the "
        "batch's targets",
    )
    num_negatives: int = flag(256, "items sampled a prediction")
    negative_power: float = flag(
        0.0,
        "items are sampled in proportion to their training interactions to this power, 0 for "
        "uniformly; not with gbce",
    )
    logq: bool = flag(
        False,
        "sampled_softmax and in_batch: scores of negatives less the log of how often they are "
        "expected among the candidates",
    )
    label_smoothing: float = flag(0.0, "share of the target spread over all candidates, softmaxes")
    gbce_t: float = flag(0.75, "calibration t of gBCE, 0 to 1")
    temperature: float = flag(1.0, "scores are divided by it")
    cosine: bool = flag(False, "scores are cosines, not dot products")
    hard_negatives: int = flag(
        0, "with --loss in_batch: so many of the texts most like the target's are candidates too"
    )
    separate_outputs: bool = flag(False, "predictions are scored with item vectors of their own")
    items: str = flag(
        "id",
        "item vectors: id (learned), frozen (projected text vectors), init (learned, starting as "
        "text vectors), add (learned plus projected text), codes (sums of the vectors of semantic "
        "codes)",
    )
    text_encoder: str | None = flag(None, "")
    history_term: bool = flag(
        False,
        "items that the user has have a score of their own: theirs times a learned factor, plus a "
        "learned number, as in finetune --method head",
    )
    projection_layers: int = flag(2, "linear layers from text to item vectors")
    features: str | None = flag(
        None,
        "join the features of the folder (recformer process --features) with the items: concat, "
        "sum or product",
    )
    feature_dropout: float = flag(
        0.0, "features: each of an item or interaction is left out so often in training"
    )
    swap_noise: float = flag(
        0.0, "features: each of an item or interaction is that of another so often in training"
    )
    soft_one_hot: int = flag(
        0, "features: numbers as a soft one-hot over so many learned vectors, 0 for a projection"
    )
    semantic_ids: str | None = flag(
        None, "file of recformer semantic-ids, for --items codes, tiger and gpt2_codes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "projection_layers", "num_negatives")
        _at_least(self, 0, "hard_negatives")
        _one_of(self, "loss", LOSSES)
        _one_of(self, "items", KINDS)
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature}: must be above 0")
        if not 0 <= self.gbce_t <= 1:
            raise UserError(f"--gbce_t {self.gbce_t}: must be from 0 to 1")
        if (self.items == "codes") != (self.semantic_ids is not None):
            raise UserError("--items codes and --semantic_ids FILE go together")
        needs_text = self.items in ("frozen", "init", "add") or self.hard_negatives > 0
        if needs_text != (self.text_encoder is not None):
            raise UserError(
                "--text_encoder goes with --items frozen, init or add, or with --hard_negatives; "
                f"got --items {self.items} and --text_encoder {self.text_encoder}"
            )
        if self.history_term and self.loss != "softmax":
            raise UserError(f"--history_term goes with --loss softmax, not {self.loss}")
        if self.hard_negatives and self.loss != "in_batch":
            raise UserError(f"--hard_negatives goes with --loss in_batch, not {self.loss}")
        self._check_sampling()
        self._check_features()

    def _check_sampling(self) -> None:
        if not 0 <= self.negative_power < float("inf"):
            raise UserError(f"--negative_power {self.negative_power}: must be at least 0")
        samples = [loss for loss in LOSSES if loss not in ("softmax", "in_batch", "gbce")]
        if self.negative_power and self.loss not in samples:
            raise UserError(
                f"--negative_power goes with --loss {', '.join(samples)}, not {self.loss}"
            )
        if self.logq and self.loss not in ("sampled_softmax", "in_batch"):
            raise UserError(f"--logq goes with --loss sampled_softmax or in_batch, not {self.loss}")
        if self.logq and self.hard_negatives:
            raise UserError("--logq does not go with --hard_negatives: they are not sampled")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label_smoothing {self.label_smoothing}: must be from 0 to below 1")
        if self.label_smoothing and (self.loss not in SOFTMAXES or self.history_term):
            raise UserError(
                f"--label_smoothing goes with --loss {', '.join(SOFTMAXES)} without --history_term"
            )

    def _check_features(self) -> None:
        _at_least(self, 0, "soft_one_hot")
        for name in ("feature_dropout", "swap_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be from 0 to below 1")
        if self.features is not None:
            _one_of(self, "features", AGGREGATIONS)
        elif self.feature_dropout or self.swap_noise or self.soft_one_hot:
            raise UserError(
                "--feature_dropout, --swap_noise and --soft_one_hot go with --features concat, sum "
                "or product"
            )


@dataclass(frozen=True)
class SasrecSettings(AttentionSettings, SequenceSettings):
    """Settings of SASRec."""

    from_published: str | None = flag(None, "weights of a published gSASRec file to start from")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()


@dataclass(frozen=True)
class GsasrecSettings(SasrecSettings):
    """Settings of gSASRec."""

    loss: str = "gbce"
    separate_outputs: bool = True


@dataclass(frozen=True)
class Gru4RecSettings(SequenceSettings):
    """Settings of GRU4Rec."""

    num_layers: int = 1


@dataclass(frozen=True)
class TransformerSettings(AttentionSettings, SequenceSettings):
    """Settings of any transformer of Hugging Face."""

    arch: str = flag("gpt2", "model type of transformers")
    objective: str = flag(
        "clm",
        "clm (causal), mlm (masked), plm (permuted: XLNet) or rtd (replaced items: ELECTRA); "
        + "; ".join(f"{arch}: {', '.join(own)}" for arch, own in OBJECTIVES_OF.items()),
    )
    mask_probability: float = flag(0.2, "mlm, plm and rtd: share of hidden items")
    max_span: int = flag(5, "plm: items of a span that is hidden, at most")
    discriminator_weight: float = flag(
        1.0, "rtd: weight of the discriminator's loss beside the generator's, 50 in ELECTRA"
    )
    separate_discriminator: bool = flag(
        False, "rtd: the discriminator is a network of its own, not the generator's"
    )
    feed_forward_size: int = flag(0, "width of feed-forward layers, 0 for 4 x hidden_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()
        # Runs and configurations of before have the earlier names.
        object.__setattr__(self, "objective", objective_named(self.objective))
        check_goes_with(self.arch, self.objective)
        if self.history_term and self.objective != "clm":
            raise UserError("--history_term goes with --objective clm: hidden items have no past")
        if not 0 < self.mask_probability <= 1:
            raise UserError(f"--mask_probability {self.mask_probability}: must be in (0, 1]")
        _at_least(self, 1, "max_span")
        _at_least(self, 0, "feed_forward_size")
        if not 0 <= self.discriminator_weight < float("inf"):
            raise UserError(f"--discriminator_weight {self.discriminator_weight}: at least 0")
        if self.separate_discriminator and self.objective != "rtd":
            raise UserError("--separate_discriminator goes with --objective rtd")


@dataclass(frozen=True)
class Bert4RecSettings(TransformerSettings):
    """Settings of BERT4Rec."""

    arch: str = "bert"
    objective: str = "mlm"


@dataclass(frozen=True)
class GenerativeSettings(AttentionSettings):
    """Settings of models that write items code by code."""

    num_layers: int = 4
    num_heads: int = 6
    dropout: float = 0.1
    max_length: int = 20
    semantic_ids: str | None = flag(None, "")
    num_beams: int = flag(
        50,
        "items generated for a user, 1 for greedy decoding; unset, the largest of --metric_ks if "
        "that is more",
    )
    exact_rank: bool = flag(False, "rank by the scores of all items in place of beam search")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_beams")


@dataclass(frozen=True)
class TigerSettings(GenerativeSettings):
    """Settings of TIGER; sizes are the paper's (section 4)."""

    head_size: int = flag(64, "width of an attention head")
    feed_forward_size: int = flag(1024, "")
    targets: str = flag(
        "one",
        "of each training sequence and epoch: one item at random, or all, every item but the first "
        "after those before it",
    )
    user_tokens: int = flag(
        0,
        "so many tokens that users share by their ids, one before each history (the paper has "
        "2000); 0: none, and users may be new",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "head_size", "feed_forward_size")
        _at_least(self, 0, "user_tokens")
        _one_of(self, "targets", TARGETS)


@dataclass(frozen=True)
class Gpt2CodesSettings(GenerativeSettings):
    """Settings of GPT-2 over semantic ids."""

    num_heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()


SETTINGS: dict[str, type[Settings]] = {
    "popularity": PopularitySettings,
    "text_neighbours": TextNeighboursSettings,
    "cooccurrence": CooccurrenceSettings,
    "sknn": SknnSettings,
    "vsknn": SknnSettings,
    "sasrec": SasrecSettings,
    "gsasrec": GsasrecSettings,
    "gru4rec": Gru4RecSettings,
    "bert4rec": Bert4RecSettings,
    "transformer": TransformerSettings,
    "tiger": TigerSettings,
    "gpt2_codes": Gpt2CodesSettings,
}


def names_of(model: str) -> set[str]:
    """Names of a model's settings."""
    return {field.name for field in fields(SETTINGS[model])}


def settings_of(model: str, given: Mapping[str, Any]) -> Settings:
    """Settings of a model: the given ones, and its defaults for the others.

    Raises:
        UserError: an unknown model, a setting that the model does not have, or values that are not
            allowed or do not go together.
    """
    if model not in SETTINGS:
        raise UserError(f"--model {model}: expected one of {', '.join(SETTINGS)}")
    foreign = sorted(set(given) - names_of(model))
    if foreign:
        raise UserError(f"--{foreign[0]} is no flag of --model {model}")
    settings = SETTINGS[model](**given)
    if isinstance(settings, GenerativeSettings) and settings.semantic_ids is None:
        raise UserError(
            f"--model {model} needs --semantic_ids FILE, as `recformer semantic-ids` writes it"
        )
    return settings


def flags_of_settings() -> list[tuple[str, Any, Any]]:
    """A flag for every setting of some model, (name, type, field), None where it is not given.

    The help says which models have it, where not all that train do, and their defaults.
    """
    texts: dict[str, str] = {}
    types: dict[str, Any] = {}
    defaults: dict[str, dict[str, Any]] = {}
    for model, cls in SETTINGS.items():
        hints = get_type_hints(cls)
        for field in fields(cls):
            text = next(filter(None, (_own_text(base, field.name) for base in cls.__mro__)), "")
            texts.setdefault(field.name, "")
            texts[field.name] = texts[field.name] or text
            types[field.name] = hints[field.name] | None
            defaults.setdefault(field.name, {})[model] = field.default
    trained = [model for model, cls in SETTINGS.items() if issubclass(cls, NetworkSettings)]
    flags = []
    for name, text in texts.items():
        of_model = defaults[name]
        first = next(iter(of_model.values()))
        others = {model: value for model, value in of_model.items() if value != first}
        owners = "" if set(of_model) == set(trained) else f"{', '.join(of_model)}: "
        shown = [] if first is None else [_shown(first)]
        shown += [f"{model}: {_shown(value)}" for model, value in others.items()]
        values = f" ({'; '.join(shown)})" if shown else ""
        flags.append((name, types[name], flag(None, owners + text + values)))
    return flags


def _own_text(cls: type, name: str) -> str:
    own = vars(cls).get("__dataclass_fields__", {})
    return own[name].metadata.get("help", "") if name in own else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
