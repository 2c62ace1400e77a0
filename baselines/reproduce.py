"""Make the numbers of a published table again, and say of every row whether it came out.

`recformer reproduce NAME` reads NAME.yaml of `recformer/experiments` (or the path of such a file):
data, commands, seeds, metrics, pairs of rows to be tested, what to expect and by how much a row
may differ. Raw files are looked for by name in `--raw` and checked, or downloaded where a public
address is known. What is done already is left as it is, also where OUTPUT_DIR was moved, and the
same command goes on where it was cut off. `--dry_run` says what would be run and about how long it
takes. If a row fails, the others are made all the same. Exit status 1 if a row failed or differs.

It leaves OUTPUT_DIR/data, steps, runs, and the table of all rows that are finished there as
reproduction.md, .tex, .csv and .json.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines.experiment import FOLDER, SLICES, Experiment, Run, Step
from baselines.provenance import commit, commits_of
from baselines.reproduction import OTHERWISE, Reproduction
from baselines.rows import Row, same_users, tables
from baselines.steps import Table, csv_line, step_record, step_tables
from recformer.cli import command_parser, exit_with_message
from recformer.evaluation.compare import METRICS, paired_test
from recformer.evaluation.statistics import holm
from recformer.evaluation.table import csv_table, figure_text, latex_table, markdown_table
from recformer.files import UserError, atomic_write, read_json, write_json
from recformer.processes import say

TABLE = "reproduction"  # the files of a table, with these endings
ENDINGS = (".md", ".tex", ".csv", ".json")


def plan(reproduction: Reproduction, chosen: Sequence[Step | Run]) -> list[list[str]]:
    """Rows of step, what is to do, minutes; also where raw files are missing."""
    experiment, made = reproduction.experiment, reproduction.with_bases(chosen)
    data, raw, steps = experiment.needed(made)
    rows = []
    for each in data:
        if reproduction.has_data(each):
            rows.append([f"data {each.name}", "is there", "0"])
            continue
        try:
            how = "process"
            if reproduction.lacks_raw_files(each):
                how = "generate" if each.sample is not None else "download"
        except FileNotFoundError as error:
            how = f"cannot be made: {error}"
        rows.append([f"data {each.name}", how, f"{each.minutes:.1f}"])
    for each in raw:
        try:
            if reproduction.lacks_raw_files(each):
                rows.append([f"raw files of {each.name}", "download", "0"])
        except FileNotFoundError as error:
            rows.append([f"raw files of {each.name}", f"cannot be had: {error}", "0"])
    for step in steps:
        if reproduction.made(step):
            rows.append([step.name, "is there", "0"])
            continue
        how = "; ".join(shlex.join(line) for line in reproduction.step_lines(step))
        rows.append([step.name, how, f"{step.minutes:.1f}"])
    for run in (row for row in made if isinstance(row, Run)):
        if reproduction.made(run):
            rows.append([run.name, "is there", "0"])
        else:
            minutes = experiment.minutes(run)
            rows.append([run.name, shlex.join(reproduction.line(run)), f"{minutes:.1f}"])
    rows += [
        [row.name, f"comes with {row.of}", "0"] for row in chosen if isinstance(row, Run) and row.of
    ]
    total = sum(float(row[-1]) for row in rows)
    return [*rows, ["all", experiment.hardware, f"{total:.1f}"]]


def verdict(run: Run, row: Row) -> str:
    """`reproduced`, or by how much a metric or a slice differs."""
    found = {name: x for name, (x, *_) in row.figures.items()}
    found |= {name: x for name, (_, x) in row.slices.items()}
    if lacking := [name for name in run.expected if name not in found]:
        return f"differs: {', '.join(lacking)} not there"
    off = {name: found[name] - x for name, x in run.expected.items()}
    worst = max(off, key=lambda name: abs(off[name]))
    if abs(off[worst]) <= run.tolerance + 1e-9:
        return "reproduced"
    return f"differs: {worst} {off[worst]:+.4f}"


def report(
    reproduction: Reproduction, rows: Sequence[Step | Run], failed: dict[str, str]
) -> dict[str, Any]:
    """Content of reproduction.json: a record a row, with tests within each data set.

    Args:
        reproduction: where they lie.
        rows: finished ones.
        failed: those that cannot be read are put in.
    """
    made_steps = []
    for step in (row for row in rows if isinstance(row, Step)):
        try:
            record = step_record(step, reproduction.step_folder(step))
            made_steps.append(record | {"made": _made(reproduction, step)})
        except (UserError, KeyError, TypeError, AttributeError) as error:
            place = reproduction.step_folder(step) / step.report[0]
            failed[step.name] = f"{place} cannot be read: {error!r}"
    found = []
    for run in (row for row in rows if isinstance(row, Run)):
        try:
            found.append((run, reproduction.row(run)))
        except UserError as error:
            failed[run.name] = str(error)
    records = []
    for name in dict.fromkeys(run.data for run, _ in found):
        ours = [(run, row) for run, row in found if run.data == name]
        groups = tables([row for _, row in ours], reproduction.experiment.metrics[0])
        tested = {id(row.values): row.p for group in groups for row in group}
        for run, row in ours:
            records.append(
                row.record()
                | {"name": run.name, "data": name, "p": tested[id(row.values)]}
                | {"expected": run.expected, "tolerance": run.tolerance}
                | {"verdict": verdict(run, row), "command": reproduction.line(run)}
                | {"resampled": row.run.resampled}
                | {"made": _made(reproduction, run)}
            )
    return {
        "experiment": reproduction.experiment.name,
        "title": reproduction.experiment.title,
        "metrics": list(reproduction.experiment.metrics),
        "steps": made_steps,
        "rows": records,
        "tests": tests_of(reproduction.experiment, {run.name: row for run, row in found}, failed),
    }


def tests_of(
    experiment: Experiment, rows: Mapping[str, Row], failed: dict[str, str]
) -> list[dict[str, Any]]:
    """Tables of pairs of rows, see `recformer.evaluation.compare.paired_test`, by the first metric.

    Pairs of which a row is not finished are left out; p is corrected for all pairs of a table,
    also for those.

    Args:
        experiment: with the pairs.
        rows: finished ones by name.
        failed: pairs that cannot be compared are put in.
    """
    metric, found = experiment.metrics[0], []
    for title, pairs in experiment.tests.items():
        records: list[dict[str, Any]] = []
        for one, other in (pair for pair in pairs if all(name in rows for name in pair)):
            if not same_users(rows[one], rows[other]):
                failed[f"{one} against {other}"] = "other users, targets or rules"
                continue
            difference = rows[one].values[metric] - rows[other].values[metric]
            run = rows[one].run
            records.append({"runs": [one, other], **paired_test(difference, run.sequences)})
        if records:
            lacking = [1.0] * (len(pairs) - len(records))
            corrected = holm([record["p"] for record in records] + lacking)
            lines = [r | {"p": p} for r, p in zip(records, corrected, strict=False)]
            facts = {"title": title, "metric": metric, "resampled": run.resampled}
            found.append({**facts, "rows": lines})
    return found


def _made(reproduction: Reproduction, row: Run | Step) -> Any:
    record = reproduction.record(row)
    if record is None or not record["replaced"]:
        return record and record["made"]
    return record["made"] | {"replaced": sorted(record["replaced"])}


def tables_of(content: Mapping[str, Any]) -> list[Table]:
    """Tables of a `reproduction.json`: steps, for each data set and rule of ranking figures, best
    first, and one metric by target, then pairs that are tested."""
    found = step_tables(content["steps"])
    metrics = content.get("metrics", METRICS)  # which older files do not say
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["data"], *row["rule"].values()), []).append(row)
    for (name, *_), rows in groups.items():
        rows.sort(key=lambda row: -row["figures"][metrics[0]][0])
        rule, several = rows[0]["rule"], any(row["deviation"] for row in rows)
        over_windows = rows[0].get("resampled", "users") != "users"
        caption = (
            f"{name}: split {rule['split_hash'][:12]}, full ranking, ties {rule['ties']}, seen "
            f"items {'filtered' if rule['filter_seen'] else 'kept'}; 95 % bootstrap intervals over "
            f"{rows[0].get('resampled', 'users')}"
            f"{', ± standard deviation over seeds' if several else ''}; p: paired "
            f"permutation test of {metrics[0]} against the best row, corrected by Holm"
            f"{'; all targets of all windows weigh alike' if over_windows else ''}"
        )
        cells = []
        for row in rows:
            line = [row["name"] + (f" ({len(row['seeds'])} seeds)" if row["deviation"] else "")]
            for metric in metrics:
                value, low, high = row["figures"][metric]
                line.append(figure_text(value, low, high, row["deviation"].get(metric)))
            line.append("" if row["p"] is None else f"{row['p']:.4f}")
            line.append(f"{row['train_seconds'] / 60:.1f}" if row["train_seconds"] else "")
            cells.append([*line, row["verdict"]])
        heads = ["", *metrics, "p", "minutes", "expected"]
        found += [(caption, heads, cells), *_by_target(rows, metrics[0])]
    for test in content.get("tests", ()):
        caption = (
            f"{test['title']}: paired differences of {test['metric']}, 95 % bootstrap intervals "
            f"and permutation tests over {test['resampled']}, p corrected by Holm"
        )
        cells = [
            [
                *row["runs"],
                f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]",
                f"{row['p']:.4f}",
            ]
            for row in test["rows"]
        ]
        found.append((caption, ["", "against", "difference", "p"], cells))
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """All tables of a `reproduction.json`, with when and where rows were made."""
    parts = [f"{content['title']}\n"]
    for caption, heads, cells in tables_of(content):
        parts.append((f"{caption}\n\n" if caption else "") + markdown_table(heads, cells))
    return "\n".join([*parts, origin(content)])


def latex(content: Mapping[str, Any]) -> str:
    """The same tables in LaTeX, captions as comments."""
    parts = (
        f"% {caption or content['title']}\n{latex_table(heads, cells)}"
        for caption, heads, cells in tables_of(content)
    )
    return "\n".join(parts)


def csv(content: Mapping[str, Any]) -> str:
    """All rows with numbers in full; a figure's interval and deviation in columns of their own."""
    lines = []
    for row in content["rows"]:
        line = {"data": row["data"], "name": row["name"], "seeds": len(row["seeds"]) or 1}
        for metric in content["metrics"]:
            value, low, high = row["figures"][metric]
            line |= {metric: value, f"{metric} low": low, f"{metric} high": high}
            line[f"{metric} deviation"] = row["deviation"].get(metric, "")
        seconds, p = row["train_seconds"], row["p"]
        line |= {"p": "" if p is None else p, "seconds": "" if seconds is None else seconds}
        lines.append(line | {"verdict": row["verdict"]})
    lines += map(csv_line, content["steps"])
    for test in content["tests"]:
        for row in test["rows"]:
            line = {"test": test["title"], "name": " against ".join(row["runs"])}
            lines.append(line | {name: row[name] for name in ("difference", "low", "high", "p")})
    return csv_table(lines)


def origin(content: Mapping[str, Any]) -> str:
    """Machine, versions, commit and day of each row; a line for all that have the same."""
    lines: dict[str, list[str]] = {}
    found = {row["name"]: row.get("made") for row in (*content["steps"], *content["rows"])}
    found = {name: made for name, made in found.items() if made}
    for name, made in found.items():
        versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        state = f"commit {made['commit']}" if made.get("commit") else ""
        parts = [made["machine"], versions, state, made["date"]]
        parts += [f"with another {word} (--replace)" for word in made.get("replaced", ())]
        lines.setdefault("; ".join(filter(None, parts)), []).append(name)
    states = commits_of(found.values())
    several = f"of several states of the repository: {', '.join(states)}" if states[1:] else ""
    if len(lines) == 1:
        return "; ".join(filter(None, [*lines, several])) + "\n"
    text = "".join(f"- {', '.join(names)}: {line}\n" for line, names in lines.items())
    return f"Rows are {several}\n\n{text}" if several else text


def _by_target(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Table]:
    """Table of a metric by `SLICES`; none where all targets are of one kind."""
    users = {name: n for row in rows for name, (n, _) in row["slices"].items() if name in SLICES}
    kinds = [name for name in SLICES if users.get(name)]
    if len(kinds) < 2:
        return []
    cells = [
        [row["name"], *(f"{row['slices'][k][1]:.4f}" if k in row["slices"] else "" for k in kinds)]
        for row in rows
    ]
    judged = "users" if rows[0].get("resampled", "users") == "users" else "targets"
    heads = ["", *(f"{name} ({users[name]:,.0f} {judged})" for name in kinds)]
    return [(f"{metric} by target", heads, cells)]


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
    for folder in args.raw:
        if not folder.is_dir():
            raise UserError(f"--raw {folder}: no such folder")
    chosen = [row for row in experiment.rows() if not args.only or row.name in args.only]
    output_dir = args.output_dir or Path("reproduced") / experiment.name
    replaced = dict(text.split("=", 1) for text in args.replace)
    reproduction = Reproduction(experiment, output_dir, args.raw, replaced)
    if args.dry_run:
        reproduction.refuse(chosen)
        steps = plan(reproduction, chosen)
        print(markdown_table(["step", "what", "minutes"], steps), end="")
        return
    if not args.table:
        _say_other_states(reproduction)
    failed = {} if args.table else reproduction.make(chosen)
    failed |= reproduction.damaged(row for row in experiment.rows() if row.name not in failed)
    finished = [row for row in reproduction.finished(experiment.rows()) if row.name not in failed]
    left_out = reproduction.left_out(row for row in experiment.rows() if row.name not in failed)
    if not finished:
        # Of rows that are whole, but of other flags, the table says what was so.
        whole = left_out and not failed and all(w.startswith(OTHERWISE) for w in left_out.values())
        gone = "" if whole else _remove_tables(output_dir, experiment.name)
        if failed:
            raise UserError(f"failed: {_listed(failed)}{gone}")
        some = ": without --table they are made" if args.table else ""
        some = f" ({_listed(left_out)})" if left_out else some
        raise UserError(f"no row is finished in {output_dir}{some}{gone}")
    content = report(reproduction, finished, failed)
    text = markdown(content)
    print("\n" + text, end="")
    for ending, words in zip(ENDINGS, (text, latex(content), csv(content)), strict=False):
        with atomic_write(output_dir / f"{TABLE}{ending}") as handle:
            handle.write(words)
    write_json(output_dir / f"{TABLE}.json", content, indent=1)
    print(f"written to {output_dir}: reproduction.md, .tex, .csv, .json")
    if left_out:
        print(f"not in the table: {_listed(left_out)}")
    others = set(names) - {row.name for row in finished} - failed.keys() - left_out.keys()
    if others:
        print(f"not made yet: {len(others)} of {len(names)} rows")
    wanted = {row.name for row in chosen}
    records = [row for row in (*content["steps"], *content["rows"]) if row["name"] in wanted]
    different = [record["name"] for record in records if record["verdict"] != "reproduced"]
    said = [f"failed: {_listed(failed)}"] if failed else []
    absent = wanted - {row["name"] for row in records} - failed.keys()
    if args.only and absent:
        said.append(f"not made: {', '.join(sorted(absent))}")
    if different:
        said.append(f"not as expected: {', '.join(different)}")
    if said:
        raise UserError("; ".join(said))


def _say_other_states(reproduction: Reproduction) -> None:
    """Say of rows that are finished, and stay, that another state of the repository made them."""
    here = commit()
    records = map(reproduction.record, reproduction.finished(reproduction.experiment.rows()))
    made = [record["made"] for record in records if record and record["made"].get("commit")]
    others = [each for each in made if each["commit"] != here]
    if here is not None and others:
        say(
            f"finished rows made by another commit than {here}, which stay as they are: "
            f"{len(others)} ({', '.join(each for each in commits_of(others) if each != here)})"
        )


def _remove_tables(folder: Path, experiment: str) -> str:
    """Remove the table of an experiment of which no row is finished any more; words that say so.

    It would go on to say of its rows that they are reproduced.
    """
    try:
        content = read_json(folder / f"{TABLE}.json")
    except FileNotFoundError:
        return ""
    except UserError:  # damaged, nobody knows of what
        content = None
    if isinstance(content, dict) and content.get("experiment") != experiment:
        return ""  # of another file: it may be right
    for ending in ENDINGS:
        (folder / f"{TABLE}{ending}").unlink(missing_ok=True)
    return f"; the table that lay there is removed: {folder / TABLE}{', '.join(ENDINGS)}"


def _listed(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in failed.items())


if __name__ == "__main__":
    exit_with_message(main)
