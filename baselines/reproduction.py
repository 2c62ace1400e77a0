"""Carry out an experiment in a folder: what is done already stays, what failed is said.

Every folder within says in `reproduced.json` of which recipe it is: commands, flags, data and the
steps before, with names in braces where paths will stand. So it does not matter where the folder
lies, and a changed recipe is noticed, whether commands or data changed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from baselines.command_lines import checked
from baselines.experiment import DATA_FILES, PLACE, Data, Experiment, Run, Step
from baselines.provenance import DONE, MARKS, commit, is_damaged, joined, provenance, read_record
from baselines.rows import Row, find_runs, rows_of, seeds_as_one
from recformer.cli import flag_words
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.runs import METRICS_FILE, RUN_FILE
from recformer.files import UserError, file_sha256, write_json
from recformer.processes import say
from recformer.training.run_folder import advising
from recformer.training.seeds import run_command

TEXTS = "meta_data.json"  # of a processed folder; its hash stands beside the recipe
OTHERWISE = "made otherwise: other "  # begins why a whole row is left out
_AGAIN = "remove it, and the same command makes it anew"
# Not taken for a lost one: whoever removes the file knows what the row then lacks.
_DAMAGED = (
    "cannot be read: remove its folder, and the same command makes it anew; or that file alone, "
    "and what else is there is taken as it is, of a machine that was not recorded"
)


class Reproduction:
    """An experiment in a folder.

    Args:
        experiment: what to make.
        output_dir: where to.
        raw: folders in which raw files are looked for.
        replaced: values of flags, and words of commands, that others stand in for.

    Raises:
        UserError: a value to be replaced that nothing has.
    """

    def __init__(
        self,
        experiment: Experiment,
        output_dir: Path,
        raw: Sequence[Path],
        replaced: Mapping[str, str],
    ) -> None:
        self.experiment, self.output_dir, self.raw = experiment, output_dir, raw
        self.replaced = {word: _place_of(other) for word, other in replaced.items()}
        words = {word for step in experiment.steps.values() for word in step.words()}
        words |= {v for run in experiment.runs for v in run.flags.values() if isinstance(v, str)}
        for word in self.replaced:
            if word not in words:
                raise UserError(
                    f"--replace {word}=…: no flag of {experiment.name} has that text as its value"
                )

    # --- places and command lines -----------------------------------------------------------------

    def folder(self, run: Run) -> Path:
        """Output folder of a run."""
        return self.output_dir / "runs" / run.data / (run.of or run.name)

    def data_folder(self, data: Data) -> Path:
        """Processed folder of the data."""
        return self.output_dir / "data" / data.name

    def step_folder(self, step: Step) -> Path:
        """Output folder of a step."""
        return self.output_dir / "steps" / step.name

    def _word(self, word: str) -> str:
        """A word of a command, or the one that stands in for it."""
        return self.replaced.get(word, word)

    def _filled(self, word: str, here: Path | None = None) -> str:
        """A word with folders and raw files in the places of their names."""

        def place(match: re.Match[str]) -> str:
            name, _, flag = match[1].partition(".")
            if flag:
                data = self.experiment.data[name]
                to_come = self._own_raw(data) / str(data.process[flag])
                with suppress(FileNotFoundError):  # where it is needed `make` says so
                    return str(self.raw_files(data).get(flag, to_come))
                return str(to_come)
            if name == "here" and here is not None:
                return str(here)
            if name in self.experiment.data:
                return str(self.data_folder(self.experiment.data[name]))
            return str(self.step_folder(self.experiment.steps[name]))

        return PLACE.sub(place, self._word(word))

    def step_lines(self, step: Step) -> list[list[str]]:
        """The commands of a step."""
        here = self.step_folder(step)
        return [["recformer", *(self._filled(w, here) for w in line)] for line in step.commands]

    def line(self, run: Run) -> list[str]:
        """The command of a run."""
        flags = {n: self._filled(v) if isinstance(v, str) else v for n, v in run.flags.items()}
        line = ["recformer", run.command, *flag_words(flags)]
        line += ["--data_path", str(self.data_folder(self.experiment.data[run.data]))]
        line += ["--output_dir", str(self.folder(run))]
        return line + (["--seeds", *map(str, run.seeds)] if run.seeds else [])

    # --- what is done -----------------------------------------------------------------------------

    def recipe(self, row: Run | Step) -> dict[str, Any]:
        """All that a run or a step comes from, wherever it lies, but for seeds and `--replace`."""
        data, raw, steps = self.experiment.needed([row])
        before: dict[str, Any] = {step.name: step.commands for step in steps}
        recipe: dict[str, Any] = {"data": {d.name: d.recipe() for d in (*data, *raw)}}
        if isinstance(row, Step):
            recipe["commands"] = before.pop(row.name)
        else:
            recipe |= {"command": row.command, "flags": row.flags}
        return _as_json(recipe | {"steps": before})

    def _replaced_in(self, row: Run | Step) -> dict[str, str]:
        """What stands in for words of a row and of the steps before it."""
        _, _, steps = self.experiment.needed([row])
        words = {word for step in steps for word in step.words()}
        if isinstance(row, Run):
            words |= {value for value in row.flags.values() if isinstance(value, str)}
        return {word: other for word, other in self.replaced.items() if word in words}

    def _marks(self, row: Run | Step) -> dict[str, Any]:
        """Split and texts of the processed folders that a row reads, of those that are there."""
        data, _, _ = self.experiment.needed([row])
        records = {each.name: read_record(self.data_folder(each)) for each in data}
        return {name: r[MARKS] for name, r in records.items() if r is not None and r["made"]}

    def place(self, row: Run | Step) -> Path:
        """Folder of a run or a step."""
        return self.folder(row) if isinstance(row, Run) else self.step_folder(row)

    def record(self, row: Run | Step) -> dict[str, Any] | None:
        """What a folder says of itself, None where it says nothing that can be read."""
        return read_record(self.place(row))

    def made(self, row: Run | Step) -> bool:
        """Whether a run or a step was finished by this recipe from these data and is all there.

        One that was finished with values of `--replace` counts where these are not given, too.
        """
        record = self.record(row)
        return (
            record is not None
            and bool(record["made"])
            and not self._differences(row, record)
            and self._complete(row)
        )

    def _differences(self, row: Run | Step, record: Mapping[str, Any]) -> list[str]:
        """In what a folder is another row than this one."""
        recipe, known = self.recipe(row), record["recipe"]
        other = sorted(k for k in recipe | known if recipe.get(k) != known.get(k))
        given, before = self._replaced_in(row), record["replaced"]
        if given != before and (given or not record["made"] or not self._complete(row)):
            words = [f"{word}={other}" for word, other in before.items()] or ["none"]
            other.append(f"--replace: {' '.join(words)}")
        marks = self._marks(row)
        if any(marks[name] != record[MARKS].get(name, marks[name]) for name in marks):
            other.append("content of the data")
        return other

    def _complete(self, row: Run | Step) -> bool:
        if isinstance(row, Step):
            return not row.expected or (self.place(row) / row.report[0]).is_file()
        return all(
            (place / METRICS_FILE).is_file() and any((place / "ranks").glob("*_test.parquet"))
            for place in self._places(row)
        )

    def _places(self, run: Run) -> list[Path]:
        folder = self.folder(run)
        return [folder] if not run.seeds else [folder / f"seed_{seed}" for seed in run.seeds]

    def refuse_other(self, row: Run | Step) -> None:
        """Refuse a folder in which something else was made, or nobody can say what.

        Raises:
            UserError: in what it differs, and what to do.
        """
        if is_damaged(self.place(row)):
            raise UserError(f"{self.place(row) / DONE} {_DAMAGED}")
        record = self.record(row)
        begun = isinstance(row, Run) and any(self.place(row).rglob(RUN_FILE))
        if record is None or not (record["made"] or begun):
            return
        if other := self._differences(row, record):
            raise UserError(
                f"{self.place(row)} was made otherwise (other {', '.join(other)}): {_AGAIN}"
            )

    def _mark(self, row: Run | Step, made: dict[str, Any] | None) -> None:
        path = self.place(row)
        path.mkdir(parents=True, exist_ok=True)
        record = self.record(row) or {"made": None, "before": None}
        facts: dict[str, Any] = {"recipe": self.recipe(row), "replaced": self._replaced_in(row)}
        facts |= {MARKS: self._marks(row), "made": made}
        if made is None:  # what is there of it already
            facts["before"] = record["made"] or record["before"]
        write_json(path / DONE, facts, indent=1)

    # --- raw files and data -----------------------------------------------------------------------

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

    def lacks_raw_files(self, data: Data) -> bool:
        """Whether raw files are still to be downloaded or generated."""
        return self._lacking(data, self.raw_files(data))

    @staticmethod
    def _lacking(data: Data, files: Mapping[str, Path]) -> bool:
        return len(files) < sum(name in data.process for name in DATA_FILES)

    def _roots(self, data: Data) -> list[Path]:
        """Folders in which raw files may lie."""
        own = [self._own_raw(data)]
        return own if data.sample is not None else [*self.raw, *own]

    def _own_raw(self, data: Data) -> Path:
        """Where raw files are downloaded or generated to; another sample has another folder."""
        name = data.name if data.sample is None else f"{data.kind}_{data.sample}"
        return self.output_dir / "raw" / name

    @staticmethod
    def _is_right(data: Data, path: Path) -> bool:
        return path.name not in data.sha256 or file_sha256(path) == data.sha256[path.name]

    def fetch(self, data: Data) -> dict[str, Path]:
        """Raw files by flag, downloaded or generated where they are not there.

        Raises:
            FileNotFoundError, UserError: as `raw_files`, or a command failed.
        """
        files = self.raw_files(data)  # hashed each time, which takes seconds a gigabyte
        if self._lacking(data, files):
            raw = self._own_raw(data)
            if data.sample is not None:
                fetch = ["sample", "--output_dir", str(raw), "--seed", str(data.sample)]
                fetch += ["--kind", data.kind]
            else:
                fetch = ["download", str(data.download), "--output_path", str(raw)]
            self._run(["recformer", *fetch])
            files = self.raw_files(data)
        return files

    def has_data(self, data: Data) -> bool:
        """Whether the processed folder is there."""
        return (self.data_folder(data) / "dataset.json").exists()

    def _data_record(self, data: Data) -> dict[str, Any]:
        """What a processed folder says of itself, of these data.

        Raises:
            UserError: nothing, or another recipe; what to do.
        """
        folder, recipe = self.data_folder(data), _as_json(data.recipe())
        record = read_record(folder)
        if record is None:
            raise UserError(f"{folder} does not say of which recipe it is ({DONE}): {_AGAIN}")
        other = sorted(k for k in recipe if recipe[k] != record["recipe"].get(k))
        if other:
            raise UserError(f"{folder} was made otherwise (other {', '.join(other)}): {_AGAIN}")
        return record

    def prepare(self, data: Data) -> None:
        """Make the processed folder, where it is not there, and look whether it is the right one.

        Raises:
            UserError: a step failed; or a folder of another recipe, that was changed since it was
                made, or of another split than the table's: what differs, and what to do.
        """
        folder = self.data_folder(data)
        recipe = _as_json(data.recipe())
        if not self.has_data(data):
            files = self.fetch(data)
            flags = {n: files.get(n, v) for n, v in data.process.items()}
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / DONE, {"recipe": recipe, "made": None}, indent=1)
            self._run(["recformer", "process", *flag_words(flags), "--output_path", str(folder)])
        record = self._data_record(data)
        split = ProcessedFolder.load(folder).split_hash
        marks = {"split": split, TEXTS: file_sha256(folder / TEXTS)}
        if not record["made"]:  # the commands ended, or were cut off while they audited
            facts = {"recipe": recipe, MARKS: marks, "made": provenance()}
            write_json(folder / DONE, facts, indent=1)
        elif record[MARKS] != marks:
            raise UserError(f"{folder} was changed since it was made: {_AGAIN}")
        if data.split_hash is not None and split != data.split_hash:
            raise UserError(f"{folder} has the split {split[:12]}, the table was made on "
                            f"{data.split_hash[:12]}: its figures cannot be compared")  # fmt: skip

    # --- work -------------------------------------------------------------------------------------

    def _run(self, line: Sequence[str]) -> None:
        say(f"$ {shlex.join(line)}")
        if run_command([sys.executable, "-m", *line]) != 0:
            raise UserError(f"failed: {shlex.join(line)}")

    def _carry_out(self, row: Run | Step) -> None:
        """The commands of a step or a run, if that was not done.

        Raises:
            FileNotFoundError, UserError: a raw file is missing, a command failed, or a folder in
                which something else was made.
        """
        if self.made(row):
            return
        self.refuse_other(row)  # now that the data are there
        lines = self.step_lines(row) if isinstance(row, Step) else [self.line(row)]
        before, began = self._newest(row), commit()
        self._mark(row, made=None)
        for line in lines:
            self._run(line)
        if not self._complete(row):
            raise UserError(f"{self.place(row)} has no figures or ranks though its command ended: "
                            f"{_AGAIN}")  # fmt: skip
        record = self.record(row)
        earlier, made = (record or {}).get("before"), provenance(began)
        if before is not None and before == self._newest(row):  # it was finished before
            day = time.strftime("%Y-%m-%d", time.localtime(before))
            made = earlier or {"date": day, "machine": "machine not recorded", "versions": {}}
        elif earlier is not None:
            made = joined(earlier, made)
        self._mark(row, made)

    def _newest(self, row: Run | Step) -> float | None:
        """When the last of a row's figures was written, None where there are none."""
        places = self._places(row) if isinstance(row, Run) else [self.place(row)]
        name = METRICS_FILE if isinstance(row, Run) else row.report[0]
        times = [path.stat().st_mtime for place in places if (path := place / name).is_file()]
        return max(times, default=None)

    def with_bases(self, chosen: Sequence[Step | Run]) -> list[Step | Run]:
        """Rows in which those that come with others are replaced by these, each once."""
        runs = {run.name: run for run in self.experiment.runs}
        every = (runs[r.of] if isinstance(r, Run) and r.of else r for r in chosen)
        return list({row.name: row for row in every}.values())

    def refuse(self, chosen: Sequence[Step | Run]) -> None:
        """Refuse what could be known to fail; nothing is run or written.

        Raises:
            UserError: the first flag that a command lacks or value that it does not take, with its
                row, or folder in which something else was made.
        """
        rows = self.with_bases(chosen)
        for run in (row for row in rows if isinstance(row, Run)):
            try:
                checked(run.command, self.line(run)[2:])
            except (UserError, FileNotFoundError) as error:
                raise UserError(f"{self.experiment.file}, run {run.name}: {error}") from error
        data, _, steps = self.experiment.needed(rows)
        for row in (*steps, *rows):
            self.refuse_other(row)
        for each in filter(self.has_data, data):
            self._data_record(each)

    def make(self, chosen: Sequence[Step | Run]) -> dict[str, str]:
        """Make what rows lack; what could be known to fail is said before anything is run.

        Returns:
            name of data, step or row -> why it failed, or why a row could not be begun.

        Raises:
            FileNotFoundError, UserError: as `refuse`, raw files.
        """
        rows = self.with_bases(chosen)
        self.refuse(rows)
        lacking = [row for row in rows if not self.made(row)]
        sets, _, steps = self.experiment.needed(lacking)
        raw = self.experiment.read_by(row for row in (*steps, *lacking) if not self.made(row))
        for data in (*(d for d in sets if not self.has_data(d)), *raw):
            self.raw_files(data)
        failed: dict[str, str] = {}
        for data in self.experiment.needed(rows)[0]:
            if data in sets or self.has_data(data):
                self._try(data.name, partial(self.prepare, data), failed)
        for data in raw:
            if data.name not in failed:
                self._try(data.name, partial(self.fetch, data), failed)
        for row in {row.name: row for row in (*steps, *rows)}.values():
            needed = (each.name for part in self.experiment.needed([row]) for each in part)
            broken = next((each for each in needed if each != row.name and each in failed), None)
            if broken is not None:
                failed[row.name] = f"{broken} failed"
            else:
                self._try(row.name, partial(self._carry_out, row), failed)
        for row in chosen:
            if isinstance(row, Run) and row.of in failed:
                failed[row.name] = f"{row.of} failed"
        return failed

    @staticmethod
    def _try(name: str, work: Callable[[], object], failed: dict[str, str]) -> None:
        try:
            with advising(_AGAIN):
                work()
        except (UserError, FileNotFoundError) as error:
            say(f"{name}: {error}")
            failed[name] = str(error)

    # --- what comes of it -------------------------------------------------------------------------

    def finished(self, chosen: Iterable[Step | Run]) -> list[Step | Run]:
        """Rows that can be put into a table as they are."""
        return [row for row in chosen if all(map(self.made, self.with_bases([row])))]

    def damaged(self, rows: Iterable[Step | Run]) -> dict[str, str]:
        """Rows of which nobody can say what they are, with the file that should."""
        places = {row.name: self.place(row) for row in rows}  # of a row with others, theirs
        return {n: f"{place / DONE} {_DAMAGED}" for n, place in places.items() if is_damaged(place)}

    def left_out(self, rows: Iterable[Step | Run]) -> dict[str, str]:
        """Rows that something is there of and that are no rows of a table, with why."""
        found = {}
        for row in rows:
            (base,) = self.with_bases([row])
            record = self.record(base)
            if self.made(base):
                continue
            if record is None:
                if self._newest(base) is not None:
                    found[row.name] = f"figures without their {DONE}"
                continue
            other = self._differences(base, record)
            found[row.name] = f"{OTHERWISE}{', '.join(other)}" if other else "unfinished"
        return found

    def row(self, run: Run) -> Row:
        """The row of a finished run.

        Raises:
            UserError: a folder without its figures.
        """
        folder, evaluation = self.folder(run), run.evaluation or ""
        runs = [(p, e, n) for place in self._places(run) for p, e, n in find_runs(place.parent)
                if p == place and e == evaluation]  # fmt: skip
        rows = seeds_as_one(rows_of(runs, None, self.experiment.metrics))
        if len(rows) != 1:
            raise UserError(f"{folder} has not the figures of a row ({len(rows)}): {_AGAIN}")
        if run.seeds and sorted(rows[0].seeds) != sorted(run.seeds):
            raise UserError(f"{folder} has not the figures of every seed: {_AGAIN}")
        return rows[0]


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _place_of(value: str) -> str:
    """A folder or file from anywhere, another value as it is."""
    return os.path.abspath(value) if Path(value).exists() else value
