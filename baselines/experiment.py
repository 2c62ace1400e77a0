"""Files of experiments: data, steps, runs with their seeds, what to expect, pairs to be tested.

`recformer reproduce` carries them out; those of the package are in `recformer/experiments`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from baselines.command_lines import COMMANDS
from recformer.evaluation.compare import METRICS
from recformer.files import UserError, read_yaml, yaml_file
from recformer.preparation.sample_season import SAMPLES

FOLDER = Path(__file__).resolve().parents[1] / "recformer" / "experiments"
DATA_FILES = ("file_path", "meta_file_path")
METRIC = re.compile(r"(NDCG|Recall|MRR)@[1-9]\d*|MRR")
# Columns of the table by target, of the first metric. Of leave-one-out and of time; of windows,
# where an item is new that nobody met before the window.
SLICES = ("cold target", "rare target", "frequent target", "known target", "new target")
PLACE = re.compile(r"\{([^{}]+)\}")  # a name in braces
# What there is to expect of a step, by the last of its commands: a file it writes, and figures.
CODES = ("reconstruction_error", "usage", "entropy", "colliding_items", "largest_collision")
COUNTED = ("users", "items", "interactions", "targets")
SHARES = ("ties", "cold", "seen", "same", "no_history", "later")  # of the targets, but the last
# Of a file; what `flags` holds is for YAML's anchors alone, flags that rows share.
KEYS = ("title", "hardware", "metrics", "data", "flags", "run", "runs", "steps", "tests")
FORM = (TypeError, KeyError, AttributeError, ValueError)  # of what has another form
REPORTS = {"semantic-ids": ("report.json", CODES), "audit": ("audit.json", (*COUNTED, *SHARES))}

Part = TypeVar("Part", bound="Data | Step | Run")


@dataclass(frozen=True)
class Data:
    """Recipe of a processed folder.

    Attributes:
        name: within the experiment.
        process: flags of `recformer process`; those of `DATA_FILES` are names of raw files.
        sha256: of raw files by name, where they must be these very ones.
        download: what `recformer download` calls the raw files; None where it knows no address.
        sample: seed of the generated sample, in place of raw files.
        kind: of sample, as `recformer sample --kind` has them.
        origin: where the raw files come from, in words.
        split_hash: of the processed folder.
        minutes: about how long it takes.
    """

    name: str
    process: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict)
    download: str | None = None
    sample: int | None = None
    kind: str = SAMPLES[0]
    origin: str = ""
    split_hash: str | None = None
    minutes: float = 0.5

    def recipe(self) -> dict[str, Any]:
        """What the processed folder follows from."""
        sample = (
            self.sample if self.kind == SAMPLES[0] else {"kind": self.kind, "seed": self.sample}
        )
        return {"process": self.process, "sha256": self.sha256, "sample": sample}


@dataclass(frozen=True)
class Step:
    """What is made once: codes of items or a pretrained encoder that runs need, an audit of data.

    In its commands, and in the flags of runs, `{NAME}` stands for the folder of data or of a step;
    in its commands also `{here}` for its own, and `{DATA.file_path}` for a raw file of some data.

    Attributes:
        name: within the experiment.
        commands: words after `recformer`, one command after the other.
        expected: figure -> value (of a list the last one). A step that has some is a row of its
            own; see `REPORTS`.
        tolerance: by which share of the expected value a figure may differ; counts of an audit and
            zeros may not.
        minutes: about how long all its commands take.
    """

    name: str
    commands: list[list[str]]
    expected: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.1
    minutes: float = 1.0

    def words(self) -> list[str]:
        """Of all its commands."""
        return [word for command in self.commands for word in command]

    @property
    def report(self) -> tuple[str, tuple[str, ...]]:
        """The file with its figures, and their names; an empty name where it has none."""
        return REPORTS.get(self.commands[-1][0], ("", ()))


@dataclass(frozen=True)
class Run:
    """A row: one command, once or once a seed.

    Attributes:
        name: of the row and its folder.
        command: `baseline` or `finetune`.
        data: name of its `Data`.
        flags: of the command, as a mapping.
        seeds: one run each; empty for the command's own.
        evaluation: `zero_shot`; None for the run's last one.
        expected: metric -> value on the test users, a mean over seeds; also of `SLICES`, the first
            metric's value for these users.
        tolerance: by which each of these may differ.
        minutes: about how long a seed takes.
        of: name of the run whose folder is read, where no run of its own is needed.
    """

    name: str
    command: str
    data: str
    flags: dict[str, Any]
    expected: dict[str, float]
    tolerance: float
    minutes: float
    seeds: tuple[int, ...] = ()
    evaluation: str | None = None
    of: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A file of experiments.

    Attributes:
        name: of the file.
        title: what it shows.
        hardware: on which its figures were made.
        data, runs, steps: see there.
        metrics: of its tables; the first is what rows are ordered and tested by.
        tests: title of a table -> pairs of runs, each tested against the other over the same
            targets; p is corrected for the number of pairs.
        file: that it was read from, as messages name it.
    """

    name: str
    title: str
    hardware: str
    data: dict[str, Data]
    runs: list[Run]
    steps: dict[str, Step] = field(default_factory=dict)
    metrics: tuple[str, ...] = METRICS
    tests: dict[str, list[list[str]]] = field(default_factory=dict)
    file: str = ""

    @classmethod
    def load(cls, name_or_file: str) -> Experiment:
        """Read a file, or the file of that name in `recformer/experiments`.

        Raises:
            FileNotFoundError: there is none; names those that there are.
            UserError: not of this form.
        """
        path = yaml_file(name_or_file, FOLDER, "experiment")
        content = read_yaml(path)
        try:
            if unknown := sorted(set(map(str, content)) - set(KEYS)):
                raise ValueError(f"{', '.join(unknown)}; expected of {', '.join(KEYS)}")
            data, runs, steps = {}, [], {}
            for name, facts in content["data"].items():
                with _naming(f"data {name}"):
                    data[name] = _part(Data, name, facts)
            shared = content.get("run") or {}
            for name, facts in (content.get("runs") or {}).items():
                with _naming(f"run {name}"):
                    facts = {"flags": {}, "command": "", **shared, **facts}
                    facts["seeds"] = tuple(facts.get("seeds", ()))
                    runs.append(_part(Run, name, facts))
            seeds = {run.name: run.seeds for run in runs}
            runs = [replace(r, seeds=r.seeds or seeds.get(r.of or "", ())) for r in runs]
            for name, facts in (content.get("steps") or {}).items():
                with _naming(f"step {name}"):
                    commands = [shlex.split(c) for c in facts.get("commands") or ()]
                    steps[name] = _part(Step, name, facts | {"commands": commands})
            metrics, tests = content.get("metrics", list(METRICS)), content.get("tests") or {}
            if not isinstance(metrics, list) or not metrics:
                raise UserError(f"{path}: metrics are {metrics!r}, expected a list of some")
            title, hardware = content["title"], content["hardware"]
            of = (data, runs, steps, tuple(metrics), tests)
            this = cls(path.stem, title, hardware, *of, file=str(path))
            this.check(path)
        except UserError:
            raise
        except FORM as error:
            raise UserError(f"{path} is no experiment: {error}") from error
        return this

    def check(self, path: Path) -> None:
        """Refuse what names nothing, and numbers that are none.

        Raises:
            UserError: of a run that says which data, command, metric or other run it means.
        """
        for name in self.metrics:
            if not METRIC.fullmatch(str(name)) or self.metrics.count(name) > 1:
                raise UserError(
                    f"{path}, metrics: {name}; expected NDCG@k, Recall@k, MRR@k, MRR, each once"
                )
        if not self.rows():
            raise UserError(f"{path}: no rows; expected runs, or steps with something expected")
        names = {run.name: run for run in self.runs if run.of is None}
        for data in self.data.values():
            where = f"{path}, data {data.name}"
            if not isinstance(data.process, dict) or "file_path" not in data.process:
                raise UserError(f"{where}: process is {data.process!r}, expected file_path: NAME")
            if data.kind not in SAMPLES or (data.kind != SAMPLES[0] and data.sample is None):
                known = ", ".join(SAMPLES)
                raise UserError(f"{where}: kind {data.kind!r}, expected {known}, with sample: SEED")
            if not isinstance(data.sha256, dict):
                raise UserError(f"{where}: sha256 is {data.sha256!r}, expected NAME: HASH")
            _check_number(where, "minutes", data.minutes)
        twice = self.steps.keys() & ({run.name for run in self.runs} | self.data.keys())
        if twice or "here" in self.steps:
            raise UserError(f"{path}, step {min(twice or ['here'])}: the name is taken")
        if twice := self.data.keys() & {run.name for run in self.runs}:
            raise UserError(f"{path}, run {min(twice)}: data have that name")
        before: list[str] = ["here"]
        for step in self.steps.values():
            where = f"{path}, step {step.name}"
            if not all(step.commands) or not step.commands:
                raise UserError(f"{where}: commands are {step.commands}, expected some")
            self._check_places(where, step.words(), before)
            before.append(step.name)
            for name, value in step.expected.items():
                if name not in (figures := step.report[1]):
                    raise UserError(f"{where}: expected {name}; of {', '.join(figures) or 'none'}")
                _check_number(where, f"expected {name}", value)
            _check_number(where, "tolerance", step.tolerance)
            _check_number(where, "minutes", step.minutes)
        for run in self.runs:
            where = f"{path}, run {run.name}"
            if run.data not in self.data:
                raise UserError(f"{where}: no data {run.data!r}")
            self._check_places(where, map(str, run.flags.values()), list(self.steps))
            if run.of is not None and run.of not in names:
                raise UserError(f"{where}: no run {run.of!r}")
            if run.of is not None and run.seeds != names[run.of].seeds:
                raise UserError(f"{where}: seeds {run.seeds}, {run.of} has {names[run.of].seeds}")
            whole = all(type(seed) is int and seed >= 0 for seed in run.seeds)
            if not whole or len(set(run.seeds)) < len(run.seeds):
                raise UserError(f"{where}: seeds {list(run.seeds)}, expected other whole numbers")
            for name, value in run.expected.items():
                _check_number(where, f"expected {name}", value)
            _check_number(where, "tolerance", run.tolerance)
            _check_number(where, "minutes", run.minutes)
            if run.of is None and run.command not in COMMANDS:
                raise UserError(f"{where}: command {run.command!r}, expected {', '.join(COMMANDS)}")
            if run.evaluation not in (None, "zero_shot"):
                raise UserError(
                    f"{where}: evaluation {run.evaluation!r}, expected zero_shot or none"
                )
            if run.evaluation and names.get(run.of or run.name, run).command == "baseline":
                raise UserError(f"{where}: evaluation {run.evaluation}, which a baseline has not")
            columns = (*self.metrics, *SLICES)
            unknown = [str(name) for name in run.expected if name not in columns]
            if unknown or not run.expected:
                named = ", ".join(unknown) or "nothing"
                raise UserError(f"{where}: expected {named}; of {', '.join(columns)}")
        if not all(isinstance(title, str) for title in self.tests):
            raise UserError(f"{path}, tests: {list(self.tests)}, expected titles in words")
        for title, pairs in self.tests.items():
            rows = {run.name for run in self.runs}
            for pair in pairs:
                two = isinstance(pair, list) and len(set(pair)) == len(pair) == 2
                if not two or not set(pair) <= rows or pairs.count(pair) > 1:
                    raise UserError(
                        f"{path}, tests, {title}: {pair}, expected two of its runs, each pair once"
                    )

    def _check_places(self, where: str, words: Iterable[str], known: Sequence[str]) -> None:
        """Refuse a `{NAME}` that names no data, no step before, no raw file."""
        for name in places_in(words):
            data, _, flag = name.partition(".")
            raw = data in self.data and flag in DATA_FILES and flag in self.data[data].process
            if not (raw or name in self.data or name in known):
                raise UserError(f"{where}: {{{name}}} is no data, no raw file and no step before")

    def minutes(self, run: Run) -> float:
        """About how long all seeds of a run take; 0 for a row that comes with another."""
        return 0.0 if run.of is not None else run.minutes * max(1, len(run.seeds))

    def needed(self, rows: Iterable[Step | Run]) -> tuple[list[Data], list[Data], list[Step]]:
        """What rows need: data to process, data of which raw files are read, and steps, a step
        after those that it needs."""
        data: dict[str, Data] = {}
        raw: dict[str, Data] = {}
        steps: dict[str, Step] = {}

        def add(words: Iterable[str]) -> None:
            for name in places_in(words):
                if name in self.steps:
                    add_step(self.steps[name])
                elif name in self.data:
                    data[name] = self.data[name]
                elif "." in name:
                    raw[name.partition(".")[0]] = self.data[name.partition(".")[0]]

        def add_step(step: Step) -> None:
            add(step.words())
            steps.setdefault(step.name, step)

        for row in rows:
            if isinstance(row, Step):
                add_step(row)
            else:
                data[row.data] = self.data[row.data]
                add(map(str, row.flags.values()))
        return list(data.values()), list(raw.values()), list(steps.values())

    def read_by(self, rows: Iterable[Step | Run]) -> list[Data]:
        """Data of which commands of these rows themselves read raw files."""
        names: list[str] = []
        for row in rows:
            words = row.words() if isinstance(row, Step) else map(str, row.flags.values())
            names += [name.partition(".")[0] for name in places_in(words) if "." in name]
        return [self.data[name] for name in dict.fromkeys(names) if name in self.data]

    def rows(self) -> list[Step | Run]:
        """What has a row of a table: steps with something to expect, then runs."""
        return [*(step for step in self.steps.values() if step.expected), *self.runs]


def _check_number(where: str, name: str, value: Any) -> None:
    """Refuse what is no number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        hint = " (YAML writes 5.0e-5, with a point)" if isinstance(value, str) else ""
        raise UserError(f"{where}: {name} is {value!r}, expected a number{hint}")
    if value < 0:
        raise UserError(f"{where}: {name} is {value}, expected 0 or more")


def _part(kind: type[Part], name: Any, facts: dict[str, Any]) -> Part:
    """Data, a step or a run of what a file says of it.

    Raises:
        ValueError, TypeError: it lacks something, has what is not known or mappings that are none,
            or its name cannot be a folder's, which is not hidden and lies where it should.
    """
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\")
    if not plain or not name or name != name.strip() or name.startswith("."):
        raise ValueError(
            f"the name is {name!r}, expected that of a folder: text without / and \\, without a "
            "point before it and without spaces around it"
        )
    known = {each.name: each for each in fields(kind) if each.name != "name"}
    if unknown := [str(key) for key in facts if key not in known]:
        raise ValueError(f"{', '.join(unknown)}; expected of {', '.join(known)}")
    for key, each in known.items():
        needed = each.default is MISSING and each.default_factory is MISSING
        if needed and key not in facts:
            raise ValueError(f"lacks {key}")
        if key in ("flags", "expected") and not isinstance(facts.get(key, {}), dict):
            raise ValueError(f"{key} is {facts[key]!r}, expected NAME: VALUE")
    return kind(name=name, **facts)


@contextmanager
def _naming(part: str) -> Iterator[None]:
    """Errors of form with the part of the file that has them."""
    try:
        yield
    except FORM as error:
        raise ValueError(f"{part}: {error}") from error


def places_in(words: Iterable[str]) -> list[str]:
    """Names in braces, each once."""
    return list(dict.fromkeys(name for word in words for name in PLACE.findall(word)))
