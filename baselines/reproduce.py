"""Make the numbers of a published table again, and say of every row whether it came out.

`recformer reproduce NAME` reads NAME.yaml of `recformer/experiments` (or the path of such a file):
data, commands, seeds, what to expect and by how much a row may differ. Raw files are looked for by
name in `--raw` and checked, or downloaded where a public address is known. What is done already is
left as it is, so that the same command goes on where it was cut off. `--dry_run` says what would be
run and about how long it takes. Exit status 1 if a step fails or a row differs.

It leaves OUTPUT_DIR/data, steps, runs, and the table as reproduction.md and .json.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from baselines.command_lines import checked
from baselines.experiment import DATA_FILES, FOLDER, PLACE, Data, Experiment, Run, Step
from baselines.rows import Row, find_runs, rows_of, seeds_as_one, tables
from recformer.cli import command_parser, exit_with_message, flag_words
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.compare import METRICS
from recformer.evaluation.table import figure_text, markdown_table
from recformer.files import UserError, atomic_write, read_json, write_json
from recformer.processes import say
from recformer.training.seeds import run_command

DONE = "reproduced.json"  # in a run's or a step's folder: which commands made it
# What a table says of semantic ids.
CODES = ("reconstruction_error", "usage", "entropy", "colliding_items", "largest_collision")


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

    def step_folder(self, step: Step) -> Path:
        """Output folder of a step."""
        return self.output_dir / "steps" / step.name

    def _filled(self, word: str, here: Path | None = None) -> str:
        """A word with folders and raw files in the places of their names, or another in its own."""

        def place(match: re.Match[str]) -> str:
            name, _, flag = match[1].partition(".")
            if flag:
                data = self.experiment.data[name]
                to_come = self.output_dir / "raw" / name / str(data.process[flag])
                return str(self.raw_files(data).get(flag, to_come))
            if name == "here" and here is not None:
                return str(here)
            if name in self.experiment.data:
                return str(self.data_folder(self.experiment.data[name]))
            return str(self.step_folder(self.experiment.steps[name]))

        return PLACE.sub(place, self.replaced.get(word, word))

    def step_lines(self, step: Step) -> list[list[str]]:
        """The commands of a step; its raw files must be there."""
        here = self.step_folder(step)
        return [["recformer", *(self._filled(w, here) for w in line)] for line in step.commands]

    def line(self, run: Run) -> list[str]:
        """The command of a run."""
        flags = {n: self._filled(v) if isinstance(v, str) else v for n, v in run.flags.items()}
        line = ["recformer", run.command, *flag_words(flags)]
        line += ["--data_path", str(self.data_folder(self.experiment.data[run.data]))]
        line += ["--output_dir", str(self.folder(run))]
        return line + (["--seeds", *map(str, run.seeds)] if run.seeds else [])

    def commands(self, row: Run | Step) -> list[Any] | dict[str, Any]:
        """All that a run or a step comes from: its own commands, and those of the steps before."""
        own = self.line(row) if isinstance(row, Run) else self.step_lines(row)
        _, _, steps = self.experiment.needed([row])
        before = {step.name: self.step_lines(step) for step in steps if step is not row}
        return {"own": own, "steps": before} if before else own

    def made(self, row: Run | Step) -> bool:
        """Whether a run or a step was finished by just these commands, which cannot be said where
        raw files that they read are not found."""
        path = (self.folder(row) if isinstance(row, Run) else self.step_folder(row)) / DONE
        try:
            return path.exists() and read_json(path) == self.commands(row)
        except FileNotFoundError:
            return False

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

    def fetch(self, data: Data) -> dict[str, Path]:
        """Raw files by flag, downloaded or generated where they are not there.

        Raises:
            FileNotFoundError, UserError: as `raw_files`, or a command failed.
        """
        files = self.raw_files(data)
        if len(files) < sum(name in data.process for name in DATA_FILES):
            raw = self.output_dir / "raw" / data.name
            if data.sample is not None:
                fetch = ["sample", "--output_dir", str(raw), "--seed", str(data.sample)]
            else:
                fetch = ["download", str(data.download), "--output_path", str(raw)]
            self._run(["recformer", *fetch])
            files = self.raw_files(data)
        return files

    def prepare(self, data: Data) -> None:
        """Make the processed folder, where it is not there.

        Raises:
            UserError: a step failed, or the split is another one than the table's.
        """
        folder = self.data_folder(data)
        if not (folder / "dataset.json").exists():
            files = self.fetch(data)
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

    def do(self, step: Step) -> None:
        """Carry out the commands of a step, if that was not done.

        Raises:
            FileNotFoundError, UserError: a raw file is missing, or a command failed.
        """
        if not self.made(step):
            lines = self.step_lines(step)
            for line in lines:
                self._run(line)
            write_json(self.step_folder(step) / DONE, self.commands(step))

    def train(self, run: Run) -> None:
        """Run what is missing of a row.

        Raises:
            UserError: the command failed.
        """
        if run.of is None and not self.made(run):
            self._run(self.line(run))
            write_json(self.folder(run) / DONE, self.commands(run))

    def plan(self, chosen: Sequence[Step | Run]) -> list[list[str]]:
        """Rows of step, what is to do, minutes; also where raw files are missing."""
        data, raw, steps = self.experiment.needed(chosen)
        rows = []
        for each in data:
            if (self.data_folder(each) / "dataset.json").exists():
                rows.append([f"data {each.name}", "is there", "0"])
                continue
            wanted = sum(n in each.process for n in DATA_FILES)
            try:
                lacking = len(self.raw_files(each)) < wanted
                how = "process"
                if lacking:
                    how = "generate" if each.sample is not None else "download"
            except FileNotFoundError as error:
                how = f"cannot be made: {error}"
            rows.append([f"data {each.name}", how, f"{each.minutes:.1f}"])
        for each in raw:
            try:
                if len(self.raw_files(each)) < sum(n in each.process for n in DATA_FILES):
                    rows.append([f"raw files of {each.name}", "download", "0"])
            except FileNotFoundError as error:
                rows.append([f"raw files of {each.name}", f"cannot be had: {error}", "0"])
        for step in steps:
            try:
                if self.made(step):
                    rows.append([step.name, "is there", "0"])
                    continue
                how = "; ".join(shlex.join(line) for line in self.step_lines(step))
            except FileNotFoundError as error:
                how = f"cannot be made: {error}"
            rows.append([step.name, how, f"{step.minutes:.1f}"])
        for run in (row for row in chosen if isinstance(row, Run)):
            if run.of is not None:
                rows.append([run.name, f"comes with {run.of}", "0"])
                continue
            if self.made(run):
                rows.append([run.name, "is there", "0"])
                continue
            minutes = self.experiment.minutes(run)
            rows.append([run.name, shlex.join(self.line(run)), f"{minutes:.1f}"])
        total = sum(float(row[-1]) for row in rows)
        return [*rows, ["all", self.experiment.hardware, f"{total:.1f}"]]

    def make(self, chosen: Sequence[Step | Run]) -> None:
        """Make what rows lack; flags and raw files are checked before anything is run.

        Raises:
            FileNotFoundError, UserError: of `fetch`, `prepare`, `do` and `train`, or a flag.
        """
        for row in chosen:
            if isinstance(row, Run) and row.of is None:
                checked(row.command, self.line(row)[2:])
        sets, raw, steps = self.experiment.needed(chosen)
        lacking = [d for d in sets if not (self.data_folder(d) / "dataset.json").exists()]
        for data in [*lacking, *raw]:
            self.raw_files(data)
        for data in sets:
            self.prepare(data)
        for data in raw:
            self.fetch(data)
        for step in steps:
            self.do(step)
        for row in chosen:
            if isinstance(row, Run):
                self.train(row)

    def finished(self, chosen: Sequence[Step | Run]) -> list[Step | Run]:
        """Rows that can be put into a table as they are."""
        runs = {run.name: run for run in self.experiment.runs}
        return [
            row
            for row in chosen
            if self.made(runs[row.of] if isinstance(row, Run) and row.of else row)
        ]

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


def step_record(step: Step, folder: Path) -> dict[str, Any]:
    """What a table says of semantic ids, and whether that was expected."""
    found = read_json(folder / "report.json")
    values = {n: v[-1] if isinstance(v := found[n], list) else v for n in step.expected}
    off = {name: values[name] / value - 1 for name, value in step.expected.items()}
    worst = max(off, key=lambda name: abs(off[name]))
    right = abs(off[worst]) <= step.tolerance + 1e-9
    return (
        {"name": step.name, "items": found["items"], "seconds": sum(found["seconds"].values())}
        | {name: found[name] for name in CODES}
        | {"expected": step.expected, "tolerance": step.tolerance}
        | {"verdict": "reproduced" if right else f"differs: {worst} {off[worst]:+.1%}"}
    )


def report(
    reproduction: Reproduction, found: Sequence[tuple[Run, Row]], steps: Sequence[Step] = ()
) -> dict[str, Any]:
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
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in packages},
        "steps": [step_record(step, reproduction.step_folder(step)) for step in steps],
        "rows": records,
    }


SLICES = ("cold target", "rare target", "frequent target")


def markdown(content: Mapping[str, Any]) -> str:
    """Tables of a `reproduction.json`: semantic ids, and for each data set figures, best first, and
    one metric by target."""
    text = f"{content['title']}\n"
    if content.get("steps"):
        text += f"\n{_codes_table(content['steps'])}"
    for name in dict.fromkeys(row["data"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["data"] == name]
        rows.sort(key=lambda row: -row["figures"][METRICS[0]][0])
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


def _codes_table(steps: Sequence[Mapping[str, Any]]) -> str:
    """Semantic ids: what each level loses of the vectors, and how its codes are used."""
    heads = ["", "items", "variance lost, level by level", "codes used", "entropy, bits"]
    heads += ["items that share their codes", "at most", "minutes", "expected"]
    cells = [
        [
            step["name"],
            f"{step['items']:,}",
            " ".join(f"{lost:.3f}" for lost in step["reconstruction_error"]),
            " ".join(f"{used:.1%}" for used in step["usage"]),
            " ".join(f"{bits:.2f}" for bits in step["entropy"]),
            f"{step['colliding_items']:,}",
            f"{step['largest_collision']:,}",
            f"{step['seconds'] / 60:.1f}",
            step["verdict"],
        ]
        for step in steps
    ]
    return markdown_table(heads, cells)


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
    parser.add_argument("--table", action="store_true", help="of finished rows; run nothing")
    args = parser.parse_args(argv)
    experiment = Experiment.load(args.experiment)
    names = [row.name for row in experiment.rows()]
    for name in args.only:
        if name not in names:
            raise UserError(f"--only {name}: expected of {', '.join(names)}")
    for text in args.replace:
        if "=" not in text:
            raise UserError(f"--replace {text}: expected VALUE=OTHER")
    chosen = [row for row in experiment.rows() if not args.only or row.name in args.only]
    output_dir = args.output_dir or Path("reproduced") / experiment.name
    replaced = dict(text.split("=", 1) for text in args.replace)
    reproduction = Reproduction(experiment, output_dir, args.raw, replaced)
    if args.dry_run:
        plan = reproduction.plan(chosen)
        print(markdown_table(["step", "what", "minutes"], plan), end="")
        return
    if args.table:
        chosen = reproduction.finished(chosen)
        if not chosen:
            raise UserError(f"no row is finished in {output_dir}: without --table they are made")
    else:
        reproduction.make(chosen)
    runs = [row for row in chosen if isinstance(row, Run)]
    steps = [row for row in chosen if isinstance(row, Step)]
    content = report(reproduction, reproduction.rows(runs), steps)
    text = markdown(content)
    print("\n" + text, end="")
    with atomic_write(output_dir / "reproduction.md") as handle:
        handle.write(text)
    write_json(output_dir / "reproduction.json", content, indent=1)
    print(f"written to {output_dir}: reproduction.md, reproduction.json")
    records = [*content["steps"], *content["rows"]]
    different = [record["name"] for record in records if record["verdict"] != "reproduced"]
    if different:
        raise UserError(f"not as expected: {', '.join(different)}")


if __name__ == "__main__":
    exit_with_message(main)
