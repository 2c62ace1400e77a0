"""Flags shared by the entry points, as `HfArgumentParser` dataclasses.

Published names are kept. A field's `help` is its documentation; defaults stand here once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from recformer.cli import check_seed
from recformer.config import PAPER, POOLER_TYPES, RecformerConfig
from recformer.evaluation.metrics import TIES
from recformer.evaluation.protocol import HELP as PROTOCOL_HELP
from recformer.evaluation.protocol import Protocol
from recformer.files import UserError

# A sequence holds <s> and an item, hence 2.
LEAST = {"max_token_num": 2, "max_item_embeddings": 2, "max_attr_num": 1, "max_attr_length": 1}


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field with a help text; a list as default is copied."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """The shape of an item sequence and of the encoder; unset, a checkpoint folder's own values
    stand, else the paper's."""

    max_token_num: int | None = flag(
        None, f"tokens a sequence is cut to, <s> included (paper: {PAPER['max_token_num']})"
    )
    max_item_embeddings: int | None = flag(
        None, f"newest items read of a sequence, plus 1 (paper: {PAPER['max_item_embeddings']})"
    )
    max_attr_num: int | None = flag(
        None, f"attributes read of an item (paper: {PAPER['max_attr_num']})"
    )
    max_attr_length: int | None = flag(
        None, f"tokens an attribute is cut to, with its name (paper: {PAPER['max_attr_length']})"
    )
    attention_window: int | None = flag(
        None,
        f"tokens seen around a token, half on either side (paper: {PAPER['attention_window']})",
    )
    pooler_type: str | None = flag(
        None,
        f"cls: hidden state of <s>; avg: mean over tokens (paper: {PAPER['pooler_type']}; sentence "
        "encoders such as all-MiniLM-L6-v2 want avg; avg_published counts <s> twice, for "
        "checkpoints that the published code trained so)",
        choices=list(POOLER_TYPES),
    )
    temp: float | None = flag(
        None, f"temperature that cosine similarities are divided by (paper: {PAPER['temp']})"
    )
    config_overrides: str | None = flag(
        None,
        "other fields of the configuration, e.g. hidden_size=128,num_hidden_layers=2 (sizes only "
        "with --from_scratch)",
    )

    def overrides(self) -> dict[str, Any]:
        """The configuration fields that were set by flags.

        Raises:
            UserError: `config_overrides` is not a list of NAME=VALUE, names no field, or has a
                value of another type than the field.
        """
        names = [field.name for field in fields(ModelArguments) if field.name != "config_overrides"]
        chosen = {name: getattr(self, name) for name in names}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        for name, least in LEAST.items():
            if chosen.get(name, least) < least:
                raise UserError(f"--{name} {chosen[name]}: must be at least {least}")
        defaults = RecformerConfig()
        for part in (self.config_overrides or "").split(",") if self.config_overrides else []:
            name, _, text = part.partition("=")
            name = name.strip()
            if not text or not hasattr(defaults, name):
                raise UserError(
                    f"--config_overrides: {part!r} is not NAME=VALUE of a field of RecformerConfig"
                )
            chosen[name] = _like(getattr(defaults, name), name, text.strip())
        return chosen


def _like(example: Any, name: str, text: str) -> Any:
    """`text` as a value of the type of `example`."""
    try:
        if isinstance(example, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(example)(text) if isinstance(example, (int, float)) else text
    except (KeyError, ValueError):
        kind = type(example).__name__
        raise UserError(f"--config_overrides: {name}={text} is not of type {kind}") from None


ACTIVATION_CHECKPOINTING = (
    "keep no activations within a layer but compute them again for the gradients: larger batches "
    "in the same memory, at about 1.3 times the time"
)


@dataclass
class EvaluationArguments:
    """Flags of an evaluation, the same for every entry point that evaluates."""

    protocol: str | None = flag(None, PROTOCOL_HELP)
    metric_ks: list[int] = flag([10, 50], "cut-offs of NDCG and Recall")
    ties: str = flag("expected", "rank of a target that ties with other items", choices=list(TIES))
    filter_seen: bool = flag(False, "take items of the history out of the candidates")
    eval_users: int | None = flag(None, "validate on a seeded sample of so many users")
    test_users: int | None = flag(
        None,
        "test on a sample of so many users, the same for every run over the same data; intervals "
        "and tables say so",
    )
    sampled_negatives: int | None = flag(
        None,
        "rank test targets also among so many sampled items that the user never met; such figures "
        "are not comparable with those of the full ranking and are named so",
    )

    @property
    def metric(self) -> str:
        """The metric that early stopping and the choice of the best model look at."""
        return f"NDCG@{10 if 10 in self.metric_ks else min(self.metric_ks)}"

    def protocol_record(self) -> dict[str, Any] | None:
        """The protocol's entry in `metrics.json`, see `Protocol.record`; None without one."""
        if self.protocol is None:
            return None
        return Protocol.load(self.protocol).record("evaluation", vars(self))

    def check(self) -> None:
        """Refuse values that would only fail later.

        Raises:
            UserError: names the flag, its value and what is allowed.
            FileNotFoundError: there is no such protocol.
        """
        self.protocol_record()
        if not self.metric_ks or min(self.metric_ks) < 1:
            raise UserError(f"--metric_ks {self.metric_ks}: cut-offs must be at least 1")
        for name in ("eval_users", "test_users", "sampled_negatives"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UserError(f"--{name} {number}: must be at least 1")


@dataclass
class DeviceArguments:
    """Flags of devices and precision."""

    device: list[int] | None = flag(
        None, "GPU indices, -1 for the CPU; unset: the first GPU if there is one", nargs="+"
    )
    num_processes: int = flag(1, "processes on the CPU (gloo); GPUs are named by --device")
    num_nodes: int | None = flag(
        None,
        "machines that the command is started on, each with as many processes or GPUs; unset: as "
        "many as torchrun, srun or Kubeflow say, else 1",
    )
    fp16: bool = flag(
        False, "16-bit mixed precision: bfloat16 where the hardware has it, else float16 on a GPU"
    )

    def check_devices(self) -> None:
        """Refuse values that would only fail later.

        Raises:
            UserError: names the flag, its value and what is allowed.
        """
        if self.num_processes < 1:
            raise UserError(f"--num_processes {self.num_processes}: must be at least 1")
        if self.num_processes > 1 and self.device not in (None, [-1]):
            raise UserError("--num_processes is for the CPU: with it, --device may only be -1")
        check_nodes(self.num_nodes)


def check_nodes(num_nodes: int | None) -> None:
    """Refuse a number of nodes that is none.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    if num_nodes is not None and num_nodes < 1:
        raise UserError(f"--num_nodes {num_nodes}: must be at least 1")


@dataclass
class TrainingArguments:
    """Flags of how weights are trained, which mean nothing to a model without any."""

    num_train_epochs: int = flag(16, "most epochs of a stage")
    batch_size: int = flag(16, "users in a batch of one process")
    gradient_accumulation_steps: int = flag(8, "batches per optimizer step")
    learning_rate: float = flag(5e-5, "peak learning rate of AdamW in each stage")
    weight_decay: float = flag(0.0, "weight decay of AdamW; none on biases and LayerNorm")
    warmup_steps: int = flag(100, "optimizer steps of linear warm-up in each stage")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 for no clipping")
    verbose: int = flag(3, "epochs between validations; the last epoch is always validated")


@dataclass
class RunArguments(TrainingArguments, DeviceArguments, EvaluationArguments):
    """Flags of every training run on a processed folder, whatever its model."""

    data_path: str = flag(
        "finetune_data/Scientific", "processed folder, as `recformer process` writes it"
    )
    output_dir: str = flag("result", "folder for all output")
    dataloader_num_workers: int = flag(0, "loader processes")
    seed: int = flag(42, "seed of weights, order, targets, dropout and sampled users")
    seeds: list[int] | None = flag(
        None, "in place of --seed: a run each in OUTPUT_DIR/seed_N, and their mean and deviation"
    )
    overwrite_output_dir: bool = flag(False, "start anew where --output_dir holds another run")
    wandb: bool = flag(False, "log to Weights & Biases too (offline without an account)")

    def check(self) -> None:
        """Refuse values that would only fail later.

        Raises:
            UserError: names the flag, its value and what is allowed.
        """
        super().check()
        self.check_devices()
        check_seed(self.seed)
        for name in ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "verbose"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if not self.learning_rate > 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be above 0")
