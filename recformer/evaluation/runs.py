"""Finished runs as they lie on disk: whose ranks they hold and by which rules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recformer.evaluation.ranks import TargetRanks, columns_checksum
from recformer.files import CHECKSUM, UserError, read_checked_json, write_checked_json

if TYPE_CHECKING:
    from recformer.data.processed import ProcessedFolder

# Figures can be compared where these agree.
RULE = ("split_hash", "ties", "filter_seen")


METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"  # what its figures depend on

# Figures of one evaluation, `recformer.evaluation.figures.detailed_figures` by split.
Figures = dict[str, dict[str, Any]]


def judged(number: int, drawn_from: int | None = None, of: str = "test users") -> str:
    """How many of whom were ranked, in words; `drawn_from`: where they are a sample of so many."""
    drawn = "" if drawn_from is None else f" of {drawn_from:,}"
    return f"{number:,}{drawn} {of}"


@dataclass
class StageResult:
    """Result of training one stage.

    Attributes:
        best: validation metric, None if never above that of an earlier stage.
        rows: history, a row an epoch.
        seconds: of training.
    """

    best: float | None
    rows: list[dict[str, Any]]
    seconds: float


@dataclass(kw_only=True)
class RunResult:
    """`metrics.json` of a run on a processed folder, finetuning or baseline.

    Attributes:
        evaluations: name -> split -> figures, in the order they were made.
        stages: name -> what its training brought.
        ties, filter_seen, split_hash, protocol, data_protocol, eval_users, test_users,
            sampled_negatives: the rules that the figures were made by.
        seed, precision: of the run.
        seconds_a_user: of ranking a test user, loading of batches included.
        parameters: trained ones.
        seconds: of the last command.
        train_seconds: of all epochs, validation included.
        model, settings: of a baseline.
        item_table: of Recformer's first evaluation: `encoded`, or the checkpoint's.
    """

    evaluations: dict[str, Figures]
    stages: dict[str, StageResult] = field(default_factory=dict)
    ties: str | None = None
    filter_seen: bool | None = None
    split_hash: str | None = None
    protocol: dict[str, Any] | None = None
    data_protocol: dict[str, Any] | None = None
    eval_users: int | None = None
    test_users: int | None = None
    sampled_negatives: int | None = None
    seed: int | None = None
    precision: str | None = None
    seconds_a_user: float | None = None
    parameters: int | None = None
    seconds: float | None = None
    train_seconds: float | None = None
    model: str | None = None
    settings: dict[str, Any] | None = None
    item_table: str | None = None

    @property
    def test(self) -> dict[str, Any]:
        """Figures of the last evaluation on the test users."""
        return self.evaluations[list(self.evaluations)[-1]]["test"]

    @property
    def validation(self) -> dict[str, Any]:
        """Figures of the last evaluation on the validation users.

        Raises:
            KeyError: a model from outside was judged on none.
        """
        return self.evaluations[list(self.evaluations)[-1]]["val"]

    def as_dict(self) -> dict[str, Any]:
        """As `metrics.json` holds it: `test` and, where there is one, `validation` stand out."""
        values = asdict(self)
        for name in ("train_seconds", "model", "settings", "item_table"):  # not every run's
            if values[name] is None:
                del values[name]
        names = {"test": "test", "val": "validation"}
        last = self.evaluations[list(self.evaluations)[-1]]
        return {names[split]: last[split] for split in names if split in last} | values

    def save(self, folder: Path) -> None:
        """Write `metrics.json`."""
        write_checked_json(folder / METRICS_FILE, self.as_dict())

    @classmethod
    def load(cls, folder: Path) -> RunResult:
        """Read `metrics.json`.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is damaged, or of another kind of run.
        """
        path = folder / METRICS_FILE
        values = read_checked_json(path)
        evaluations, stages = values.get("evaluations"), values.get("stages", {})
        if not isinstance(evaluations, dict) or not isinstance(stages, dict):
            raise UserError(f"{path} has no evaluations: it is not of a finetuning or a baseline")
        known = {each.name for each in fields(cls)}
        try:
            kept = {name: StageResult(**stage) for name, stage in stages.items()}
        except TypeError as error:
            raise UserError(f"{path} is damaged: {error}") from error
        return cls(**{k: v for k, v in values.items() if k in known} | {"stages": kept})


def ranks_file(folder: Path, evaluation: str, split: str) -> Path:
    """Where a run keeps the ranks of every user of a split, `val` or `test`."""
    return folder / "ranks" / f"{evaluation}_{split}.parquet"


def data_rules(folder: ProcessedFolder) -> dict[str, Any]:
    """Fields of a `RunResult` that say which data its figures are of."""
    protocol = (folder.dataset or {}).get("protocol")
    return {"split_hash": folder.split_hash, "data_protocol": protocol}


def read_ranks(path: Path) -> dict[str, NDArray[Any]]:
    """Columns of a file of ranks that `Evaluator.write_parquet` wrote, verified.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run was not evaluated on these users")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        right = columns["above"] + 1 + columns["tied"] / 2
        users, targets, among = (columns[n] for n in ("user_id", "target", "num_candidates"))
        sound = (columns["rank"] == right).all() and (right <= among).all()
        sound = sound and all(len(column) == len(users) for column in columns.values())
        sound = sound and (np.diff(users) > 0).all() and len(targets) == len(users)
        written = (table.schema.metadata or {}).get(CHECKSUM.encode())  # None: an earlier version's
        sound = sound and written in (None, columns_checksum(columns).encode())
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise UserError(f"{path} is damaged: {error or type(error).__name__}") from error
    if not sound:
        raise UserError(f"{path} is damaged: its columns contradict each other")
    return columns


@dataclass(frozen=True)
class RankedRun:
    """Ranks of one evaluation on the test users.

    Attributes:
        name: in tables.
        rule: split hash, tie rule and `filter_seen`.
        user_ids, targets: (U,) int64.
        ranks: (U,) each.
        sequences: (U,) int64, where "users" are targets of sequences, several of one sequence: the
            sequence of each; None: they are users.
        drawn_from: test users of the data, where only a sample of them was ranked; None: all were.
    """

    name: str
    rule: dict[str, Any]
    user_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    ranks: TargetRanks
    sequences: NDArray[np.int64] | None = None
    drawn_from: int | None = None

    @property
    def judged(self) -> str:
        """How many of whom were ranked, in words."""
        of = "test users" if self.sequences is None else "targets"
        return judged(len(self.user_ids), self.drawn_from, of)

    @property
    def resampled(self) -> str:
        """Of whom intervals are, in words."""
        return "users" if self.sequences is None else "sessions"

    @classmethod
    def load(cls, text: str) -> RankedRun:
        """Read `[NAME=]FOLDER[:EVALUATION]`.

        Raises:
            FileNotFoundError, UserError: as `read`.
        """
        name, _, rest = text.partition("=")
        # Either sign may stand in a folder's name: what exists decides.
        for given, place in (("", text), (name, rest)):
            path, _, evaluation = place.rpartition(":")
            if place and Path(place).is_dir():
                return cls.read(Path(place), "", given)
            if path and Path(path).is_dir():
                return cls.read(Path(path), evaluation, given)
        raise FileNotFoundError(
            f"{text} is no run: expected [NAME=]FOLDER[:EVALUATION], a folder with a metrics.json"
        )

    @classmethod
    def read(cls, folder: Path, evaluation: str = "", name: str = "") -> RankedRun:
        """Read one evaluation of a run.

        Args:
            folder: its output folder.
            evaluation: its name; the last one that has ranks if empty.
            name: in tables; by default that of the folder.

        Raises:
            FileNotFoundError: no such folder, metrics or ranks.
            UserError: the run has no such evaluation.
        """
        result = RunResult.load(folder)
        evaluations = list(result.evaluations)
        if not evaluations or (evaluation and evaluation not in evaluations):
            raise UserError(
                f"{folder} has the evaluations {', '.join(evaluations)}; {evaluation!r}?"
            )
        # A stage that brought nothing has no ranks of its own.
        kept = [e for e in evaluations if ranks_file(folder, e, "test").exists()]
        chosen = evaluation or (kept or evaluations)[-1]
        columns = read_ranks(ranks_file(folder, chosen, "test"))
        return cls(
            name=name or (f"{folder.name}:{evaluation}" if evaluation else folder.name),
            rule={name: getattr(result, name) for name in RULE},
            user_ids=columns["user_id"],
            targets=columns["target"],
            ranks=TargetRanks(columns["above"], columns["tied"], columns["num_candidates"]),
            sequences=columns.get("sequence"),
            drawn_from=result.evaluations[chosen].get("test", {}).get("drawn_from"),
        )
