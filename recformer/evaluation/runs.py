"""Finished runs as they lie on disk: whose ranks they hold and by which rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recformer.evaluation.ranks import TargetRanks
from recformer.files import UserError, read_json

# Figures can be compared where these agree.
RULE = ("split_hash", "ties", "filter_seen")


def cell_text(name: str) -> str:
    """A name in a cell of a Markdown table, which a bare `|` would end."""
    return name.replace("|", "\\|")


@dataclass(frozen=True)
class RankedRun:
    """Ranks of one evaluation on the test users.

    Attributes:
        name: in tables.
        rule: split hash, tie rule and `filter_seen`.
        user_ids, targets: (U,) int64.
        ranks: (U,) each.
    """

    name: str
    rule: dict[str, Any]
    user_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    ranks: TargetRanks

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
        import pyarrow.parquet as pq

        metrics = read_json(folder / "metrics.json")
        evaluations = list(metrics.get("evaluations", ()))
        if not evaluations or (evaluation and evaluation not in evaluations):
            raise UserError(
                f"{folder} has the evaluations {', '.join(evaluations)}; {evaluation!r}?"
            )
        # A stage that brought nothing has no ranks of its own.
        kept = [e for e in evaluations if (folder / "ranks" / f"{e}_test.parquet").exists()]
        chosen = evaluation or (kept or evaluations)[-1]
        file = folder / "ranks" / f"{chosen}_test.parquet"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: the run was not evaluated on test users"
            )
        table = pq.read_table(file)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        return cls(
            name=name or (f"{folder.name}:{evaluation}" if evaluation else folder.name),
            rule={name: metrics.get(name) for name in RULE},
            user_ids=columns["user_id"],
            targets=columns["target"],
            ranks=TargetRanks(columns["above"], columns["tied"], columns["num_candidates"]),
        )
