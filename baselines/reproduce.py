"""Make the numbers of a published table again, and say of every row whether it came out.

`recformer reproduce NAME` reads NAME.yaml of `recformer/experiments` (or the path of such a file):
data, commands, seeds, what to expect and by how much a row may differ. Raw files are looked for by
name in `--raw` and checked, or downloaded where a public address is known. What is done already is
left as it is, so that the same command goes on where it was cut off. `--dry_run` says what would be
run and about how long it takes. Exit status 1 if a step fails or a row differs.

It leaves OUTPUT_DIR/data, OUTPUT_DIR/runs, and the table as reproduction.md and .json.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from baselines.command_lines import COMMANDS, checked
from baselines.rows import Row, find_runs, rows_of, seeds_as_one, tables
from recformer.cli import command_parser, exit_with_message, flag_words
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.compare import METRICS
from recformer.evaluation.table import figure_text, markdown_table
from recformer.files import UserError, atomic_write, read_json, read_yaml, write_json, yaml_file
from recformer.processes import say
from recformer.training.seeds import run_command

FOLDER = Path(__file__).resolve().parents[1] / "recformer" / "experiments"
DATA_FILES = ("file_path", "meta_file_path")
DONE = "reproduced.json"  # in a run's folder: which command made it


@dataclass(frozen=True)
class Data:
    """Recipe of a processed folder.

    Attributes:
        name: within the experiment.
        process: flags of `recformer process`; those of `DATA_FILES` are names of raw files.
        sha256: of raw files by name, where they must be these very ones.
        download: what `recformer download` calls the raw files; None where it knows no address.
        sample: seed of the generated sample, in place of raw files.
        origin: where the raw files come from, in words.
        split_hash: of the processed folder.
        minutes: about how long it takes.
    """

    name: str
    process: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict)
    download: str | None = None
    sample: int | None = None
    origin: str = ""
    split_hash: str | None = None
    minutes: float = 0.5


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
        expected: metric -> value on the test users, a mean over seeds.
        tolerance: by which a metric may differ.
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
    """A file of experiments: what it shows, on which hardware its figures were made, its steps."""

    name: str
    title: str
    hardware: str
    data: dict[str, Data]
    runs: list[Run]

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
            data = {name: Data(name=name, **facts) for name, facts in content["data"].items()}
            shared = content.get("run", {})
            runs = []
            for name, facts in content["runs"].items():
                facts = shared | facts
                facts["seeds"] = tuple(facts.get("seeds", ()))
                runs.append(Run(name=name, **{"flags": {}, "command": "", **facts}))
            this = cls(path.stem, content["title"], content["hardware"], data, runs)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is no experiment: {error}") from error
        this.check(path)
        return this

    def check(self, path: Path) -> None:
        """Refuse what names nothing.

        Raises:
            UserError: of a run that says which data, command, metric or other run it means.
        """
        names = {run.name for run in self.runs if run.of is None}
        for run in self.runs:
            where = f"{path}, run {run.name}"
            if run.data not in self.data:
                raise UserError(f"{where}: no data {run.data!r}")
            if run.of is not None and run.of not in names:
                raise UserError(f"{where}: no run {run.of!r}")
            if run.of is None and run.command not in COMMANDS:
                raise UserError(f"{where}: command {run.command!r}, expected {', '.join(COMMANDS)}")
            if run.evaluation not in (None, "zero_shot"):
                raise UserError(
                    f"{where}: evaluation {run.evaluation!r}, expected zero_shot or none"
                )
            unknown = [name for name in run.expected if name not in METRICS]
            if unknown or not run.expected:
                raise UserError(f"{where}: expected {unknown or 'nothing'}; of {METRICS}")


class Reproduction:
    """An experiment in a folder."""

    def __init__(
        self,
        experiment: Experiment,
        output_dir: Path,
        raw: Sequence[Path],
        replaced: Mapping[str, str],
    ) -> None:
        self.experiment, self.output_dir, self.raw = experiment, output_dir, raw
        self.replaced = dict(replaced)

    def folder(self, run: Run) -> Path:
        """Output folder of a run."""
        return self.output_dir / "runs" / run.data / (run.of or run.name)

    def data_folder(self, data: Data) -> Path:
        """Processed folder of the data."""
        return self.output_dir / "data" / data.name

    def line(self, run: Run) -> list[str]:
        """The command of a run."""
        flags = {n: self.replaced.get(v, v) if isinstance(v, str) else v
                 for n, v in run.flags.items()}  # fmt: skip
        line = ["recformer", run.command, *flag_words(flags)]
        line += ["--data_path", str(self.data_folder(self.experiment.data[run.data]))]
        line += ["--output_dir", str(self.folder(run))]
        return line + (["--seeds", *map(str, run.seeds)] if run.seeds else [])

    def made(self, run: Run) -> bool:
        """Whether a run was finished by just this command."""
        path = self.folder(run) / DONE
        return path.exists() and read_json(path) == self.line(run)

    def raw_files(self, data: Data) -> dict[str, Path]:
        """Raw files of data by the flag that takes them; found, or to be downloaded.

        Raises:
            FileNotFoundError: a file is not in `--raw`, and no address is known.
            UserError: a file of the name has another content.
        """
        found: dict[str, Path] = {}
        for flag in DATA_FILES:
            name = data.process.get(flag)
            if name is None:
                continue
            every = (path for root in self._roots(data) for path in sorted(root.rglob("*")))
            places = [path for path in every if path.name == name]
            right = [path for path in places if self._is_right(data, path)]
            if right:
                found[flag] = right[0]
            elif places:
                raise UserError(f"{places[0]} is not the file that {data.name} was made of: its "
                                f"SHA-256 is not {data.sha256[name]}")  # fmt: skip
            elif data.download is None and data.sample is None:
                raise FileNotFoundError(f"{name} of {data.name} is in no folder of --raw; "
                                        f"{data.origin or 'it cannot be downloaded'}")  # fmt: skip
        return found

    def _roots(self, data: Data) -> list[Path]:
        """Folders in which raw files may lie."""
        own = [self.output_dir / "raw" / data.name]
        return own if data.sample is not None else [*self.raw, *own]

    @staticmethod
    def _is_right(data: Data, path: Path) -> bool:
        if path.name not in data.sha256:
            return True
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest() == data.sha256[path.name]

    def prepare(self, data: Data) -> None:
        """Make the processed folder, where it is not there.

        Raises:
            UserError: a step failed, or the split is another one than the table's.
        """
        folder = self.data_folder(data)
        if not (folder / "dataset.json").exists():
            raw = self.output_dir / "raw" / data.name
            files = self.raw_files(data)
            if len(files) < sum(name in data.process for name in DATA_FILES):
                if data.sample is not None:
                    fetch = ["sample", "--output_dir", str(raw), "--seed", str(data.sample)]
                else:
                    fetch = ["download", str(data.download), "--output_path", str(raw)]
                self._run(["recformer", *fetch])
                files = self.raw_files(data)
            flags = {n: files.get(n, v) for n, v in data.process.items()}
            self._run(["recformer", "process", *flag_words(flags), "--output_path", str(folder)])
        split = ProcessedFolder.load(folder).split_hash
        if data.split_hash is not None and split != data.split_hash:
            raise UserError(f"{folder} has the split {split[:12]}, the table was made on "
                            f"{data.split_hash[:12]}: its figures cannot be compared")  # fmt: skip

    def _run(self, line: Sequence[str]) -> None:
        say(f"$ {shlex.join(line)}")
        if run_command([sys.executable, "-m", *line]) != 0:
            raise UserError(f"failed: {shlex.join(line)}")

    def train(self, run: Run) -> None:
        """Run what is missing of a row.

        Raises:
            UserError: the command failed.
        """
        if run.of is None and not self.made(run):
            self._run(self.line(run))
            write_json(self.folder(run) / DONE, self.line(run))

    def plan(self, chosen: Sequence[Run]) -> list[list[str]]:
        """Rows of step, what is to do, minutes; also where raw files are missing."""
        rows = []
        for name in dict.fromkeys(run.data for run in chosen):
            data = self.experiment.data[name]
            if (self.data_folder(data) / "dataset.json").exists():
                rows.append([f"data {name}", "is there", "0"])
                continue
            wanted = sum(n in data.process for n in DATA_FILES)
            try:
                lacking = len(self.raw_files(data)) < wanted
                how = "process"
                if lacking:
                    how = "generate" if data.sample is not None else "download"
            except FileNotFoundError as error:
                how = f"cannot be made: {error}"
            rows.append([f"data {name}", how, f"{data.minutes:.1f}"])
        for run in chosen:
            if run.of is not None:
                rows.append([run.name, f"comes with {run.of}", "0"])
            elif self.made(run):
                rows.append([run.name, "is there", "0"])
            else:
                minutes = run.minutes * max(1, len(run.seeds))
                rows.append([run.name, shlex.join(self.line(run)), f"{minutes:.1f}"])
        total = sum(float(row[-1]) for row in rows)
        return [*rows, ["all", self.experiment.hardware, f"{total:.1f}"]]

    def rows(self, chosen: Sequence[Run]) -> list[tuple[Run, Row]]:
        """Rows of the runs that are finished, in the order of the experiment."""
        found = []
        for run in chosen:
            folder, evaluation = self.folder(run), run.evaluation or ""
            places = [folder] if not run.seeds else [folder / f"seed_{s}" for s in run.seeds]
            runs = [(p, e, n) for place in places for p, e, n in _evaluation(place, evaluation)]
            rows = seeds_as_one(rows_of(runs, None))
            if len(rows) != 1:
                raise UserError(f"{folder}: {len(rows)} rows where one was expected")
            found.append((run, rows[0]))
        return found


def _evaluation(folder: Path, evaluation: str) -> list[tuple[Path, str, str]]:
    every = find_runs(folder.parent)
    return [(p, e, n) for p, e, n in every if p == folder and e == evaluation]


def verdict(run: Run, row: Row) -> str:
    """`reproduced`, or by how much a metric differs."""
    off = {m: row.figures[m][0] - x for m, x in run.expected.items()}
    worst = max(off, key=lambda metric: abs(off[metric]))
    if abs(off[worst]) <= run.tolerance + 1e-9:
        return "reproduced"
    return f"differs: {worst} {off[worst]:+.4f}"


def report(reproduction: Reproduction, found: Sequence[tuple[Run, Row]]) -> dict[str, Any]:
    """Content of reproduction.json: a record a row, tests within each data set, and versions."""
    records = []
    for name in dict.fromkeys(run.data for run, _ in found):
        ours = [(run, row) for run, row in found if run.data == name]
        tested = {id(row.values): row.p for group in tables([r for _, r in ours]) for row in group}
        for run, row in ours:
            records.append(
                row.record()
                | {"name": run.name, "data": name, "p": tested[id(row.values)]}
                | {"expected": run.expected, "tolerance": run.tolerance}
                | {"verdict": verdict(run, row), "command": reproduction.line(run)}
            )
    packages = ("recformer", "torch", "transformers", "numpy")
    return {
        "experiment": reproduction.experiment.name,
        "title": reproduction.experiment.title,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
        "rows": records,
    }


SLICES = ("cold target", "rare target", "frequent target")


def markdown(content: Mapping[str, Any]) -> str:
    """Tables of a `reproduction.json` for each data set: figures, and one metric by target."""
    text = f"{content['title']}\n"
    for name in dict.fromkeys(row["data"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["data"] == name]
        rule, several = rows[0]["rule"], any(row["deviation"] for row in rows)
        text += (
            f"\n{name}: split {rule['split_hash'][:12]}, full ranking, ties {rule['ties']}, seen "
            f"items {'filtered' if rule['filter_seen'] else 'kept'}; 95 % bootstrap intervals over "
            f"users{', ± standard deviation over seeds' if several else ''}; p: paired "
            f"permutation test of {METRICS[0]} against the best row, corrected by Holm\n\n"
        )
        cells = []
        for row in rows:
            line = [row["name"] + (f" ({len(row['seeds'])} seeds)" if row["deviation"] else "")]
            for metric in METRICS:
                value, low, high = row["figures"][metric]
                line.append(figure_text(value, low, high, row["deviation"].get(metric)))
            line.append("" if row["p"] is None else f"{row['p']:.4f}")
            line.append(f"{row['train_seconds'] / 60:.1f}" if row["train_seconds"] else "")
            cells.append([*line, row["verdict"]])
        text += markdown_table(["", *METRICS, "p", "minutes", "expected"], cells)
        text += _by_target(rows)
    return text


def _by_target(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table of the users whose target was bought never, one to four times, more often in training;
    empty where all targets are of one kind."""
    users = {name: n for row in rows for name, (n, _) in row["slices"].items() if name in SLICES}
    kinds = [name for name in SLICES if users.get(name)]
    if len(kinds) < 2:
        return ""
    cells = [
        [row["name"], *(f"{row['slices'][k][1]:.4f}" if k in row["slices"] else "" for k in kinds)]
        for row in rows
    ]
    heads = ["", *(f"{name} ({users[name]:,.0f} users)" for name in kinds)]
    return f"\n{METRICS[0]} by target\n\n{markdown_table(heads, cells)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, run what is missing, compare, write."""
    parser = command_parser("reproduce", __doc__)
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
    parser.add_argument("experiment", metavar="NAME", help=f"{known}; or the path of a YAML file")
    parser.add_argument("--output_dir", type=Path, help="default: reproduced/NAME")
    parser.add_argument(
        "--raw", type=Path, nargs="+", default=[], metavar="FOLDER", help="folders of raw files"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows to make")
    parser.add_argument(
        "--replace",
        nargs="+",
        default=[],
        metavar="VALUE=OTHER",
        help="another value of a flag, e.g. sentence-transformers/all-MiniLM-L6-v2=FOLDER",
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, and stop")
    args = parser.parse_args(argv)
    experiment = Experiment.load(args.experiment)
    names = [run.name for run in experiment.runs]
    for name in args.only:
        if name not in names:
            raise UserError(f"--only {name}: expected of {', '.join(names)}")
    for text in args.replace:
        if "=" not in text:
            raise UserError(f"--replace {text}: expected VALUE=OTHER")
    chosen = [run for run in experiment.runs if not args.only or run.name in args.only]
    output_dir = args.output_dir or Path("reproduced") / experiment.name
    replaced = dict(text.split("=", 1) for text in args.replace)
    reproduction = Reproduction(experiment, output_dir, args.raw, replaced)
    if args.dry_run:
        plan = reproduction.plan(chosen)
        print(markdown_table(["step", "what", "minutes"], plan), end="")
        return
    for run in chosen:
        if run.of is None:
            checked(run.command, reproduction.line(run)[2:])
    sets = [experiment.data[name] for name in dict.fromkeys(run.data for run in chosen)]
    for data in sets:  # raw files are looked for before anything is run
        if not (reproduction.data_folder(data) / "dataset.json").exists():
            reproduction.raw_files(data)
    for data in sets:
        reproduction.prepare(data)
    for run in chosen:
        reproduction.train(run)
    content = report(reproduction, reproduction.rows(chosen))
    text = markdown(content)
    print("\n" + text, end="")
    with atomic_write(output_dir / "reproduction.md") as handle:
        handle.write(text)
    write_json(output_dir / "reproduction.json", content, indent=1)
    print(f"written to {output_dir}: reproduction.md, reproduction.json")
    different = [row["name"] for row in content["rows"] if row["verdict"] != "reproduced"]
    if different:
        raise UserError(f"not as expected: {', '.join(different)}")


if __name__ == "__main__":
    exit_with_message(main)
