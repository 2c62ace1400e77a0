"""Flags of `recformer baseline`: those of a run, and those of every model's settings."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

from baselines.settings import (
    SETTINGS,
    GenerativeSettings,
    Settings,
    flags_of_settings,
    settings_of,
)
from recformer.files import UserError, read_yaml, yaml_file
from recformer.training.arguments import RunArguments, TrainingArguments, flag

FOLDER = Path(__file__).resolve().parent / "configs"


@dataclass
class BaselineTrainingArguments(TrainingArguments):
    """Flags of training that baselines have, with their defaults."""

    num_train_epochs: int = flag(200, "epochs at most")
    batch_size: int = flag(128, "users a process and step")
    gradient_accumulation_steps: int = flag(1, "batches an optimizer step")
    learning_rate: float | None = flag(  # type: ignore[assignment]
        None, "learning rate after the warm-up; unset: 0.001, or 0.01 of adafactor"
    )
    warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    schedule: str = flag(
        "constant",
        "learning rate after the warm-up: constant, or inverse_sqrt of the step",
        choices=["constant", "inverse_sqrt"],
    )
    optimizer: str | None = flag(
        None,
        "adamw; or adafactor, whose learning rate is relative to the size of each tensor's "
        "weights and never above 1 / sqrt(step), as T5 and TIGER were trained; unset: adafactor "
        "for tiger, adamw for the others",
        choices=["adamw", "adafactor"],
    )
    max_grad_norm: float = flag(0.0, "gradients are clipped to this norm; 0 for no clipping")
    verbose: int = flag(1, "epochs between validations; the last epoch is always validated")
    patience: int = flag(10, "validations without gain before training ends")
    windows: str = flag(
        "incremental",
        "of a folder split by windows: incremental, the weights go on from window to window and "
        "train on what the last one brought; or scratch, on all before it",
        choices=["incremental", "scratch"],
    )
    evaluate_only: bool = flag(False, "rank with the weights of --from_published, do not train")


@dataclass
class BaselineRunArguments(BaselineTrainingArguments, RunArguments):
    """Train and evaluate a baseline on a processed folder by full ranking."""

    model: str = flag("sasrec", "which baseline", choices=list(SETTINGS))
    output_dir: str = flag("", "everything that is written goes there; unset: result/<model>")
    overfit_users: int | None = flag(
        None,
        "train on a seeded sample of so many users alone, and judge them on the last item of their "
        "training sequences: Recall@10 near 1 says that the model can learn at all",
    )

    def __post_init__(self) -> None:
        if self.optimizer is None:
            self.optimizer = "adafactor" if self.model == "tiger" else "adamw"
        if self.learning_rate is None:
            self.learning_rate = 0.01 if self.optimizer == "adafactor" else 1e-3

    def check(self) -> None:
        """Refuse values that would only fail later, those of the model's settings too.

        Raises:
            UserError: names the flag, its value and what is allowed.
        """
        if self.patience < 1:
            raise UserError(f"--patience {self.patience}: must be at least 1")
        if self.evaluate_only and not self.own().get("from_published"):
            raise UserError("--evaluate_only goes with --from_published: else nothing was trained")
        if self.overfit_users is not None and self.overfit_users < 1:
            raise UserError(f"--overfit_users {self.overfit_users}: must be at least 1")
        self.settings()
        super().check()

    def settings(self) -> Settings:
        """The model's settings: the given ones, and its defaults for the others.

        Raises:
            UserError: as `settings_of`.
        """
        own = self.own()
        if issubclass(SETTINGS[self.model], GenerativeSettings):
            own.setdefault("num_beams", max(GenerativeSettings.num_beams, *self.metric_ks))
        return settings_of(self.model, own)

    def own(self) -> dict[str, Any]:
        """The model's settings that were given."""
        shared = {field.name for field in fields(BaselineRunArguments)}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}
        return {name: value for name, value in values.items() if value is not None}


#: `BaselineRunArguments` with a flag for every setting of some model, None where it is not given.
BaselineArguments: type[BaselineRunArguments] = make_dataclass(
    "BaselineArguments",
    flags_of_settings(),
    bases=(BaselineRunArguments,),
    namespace={"__doc__": BaselineRunArguments.__doc__, "__module__": __name__},
)


def read_config(name_or_file: str) -> list[str]:
    """Flags of a YAML file as words of a command line, which are parsed and checked like any.

    A name is that of a file in `baselines/configs`, which the installed package has too.

    A flag whose value is null is left out.

    Raises:
        FileNotFoundError: no such file; names those that there are.
        UserError: not a YAML mapping, or a name that is no flag.
    """
    path = yaml_file(name_or_file, FOLDER, "configuration", "--config")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of flags to values")
    unknown = sorted(set(values) - {field.name for field in fields(BaselineArguments)})
    if unknown:
        raise UserError(f"{path}: {unknown[0]} is no flag of recformer baseline")
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
