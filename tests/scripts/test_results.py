"""Tables of the pages are those of what was measured, not typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from baselines.experiment import FOLDER, Experiment
from benchmarks.measure import row
from recformer.files import UserError
from scripts import results
from scripts.summaries import SUMMARIES

MACHINE = {
    "date": "2026-01-02", "cpu": "A CPU", "isa": ["avx2", "amx_tile"], "cores": 2, "threads": 2,
    "load_before": 0.1, "torch": "2", "transformers": "5",
}  # fmt: skip


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_a_page_holds_what_was_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert results.with_tables(text) == text, "run python -m scripts.results --write"


@pytest.mark.parametrize("page", results.PAGES[:2], ids=lambda page: page.name)
def test_no_table_of_the_results_is_typed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    typed = results.TABLE.sub("", text)
    assert not re.findall(r"^\|.*", typed, re.MULTILINE)
    assert "<!-- end -->" not in typed


def test_every_table_of_the_results_is_an_experiment() -> None:
    text = results.PAGES[0].read_text(encoding="utf-8")
    assert results.PAGES[0].name == "results.md"
    tables = list(results.TABLE.finditer(text))
    assert {match[2] for match in tables} == {"experiments", "reproduced"}
    assert {match[3] for match in tables if match[3]} <= {p.stem for p in FOLDER.glob("*.yaml")}


def test_every_experiment_and_every_file_of_figures_is_in_a_page() -> None:
    named = {"scale"}
    for page in results.PAGES:
        found = results.TABLE.finditer(page.read_text(encoding="utf-8"))
        named |= {match[3] for match in found if match[3]}
    assert {path.stem for path in FOLDER.glob("*.yaml")} <= named
    kept = {path.stem for path in results.FIGURES.rglob("*.json")}
    assert kept <= named


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_costs_that_are_said_first_are_not_far_below_what_the_training_took(path: Path) -> None:
    said = {run.name: run.minutes for run in Experiment.load(path.stem).runs}
    figures = json.loads((results.FIGURES / f"{path.stem}.json").read_text(encoding="utf-8"))
    for each in figures["rows"]:
        assert (each["train_seconds"] or 0) / 60 <= 1.3 * said[each["name"]], each["name"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_figures_are_of_the_split_that_the_experiment_names(path: Path) -> None:
    experiment = Experiment.load(path.stem)
    # Users learned by heart are judged on what they were trained on, a split of its own.
    own = {run.name for run in experiment.runs if "overfit_users" in run.flags}
    for kept in json.loads((results.FIGURES / f"{path.stem}.json").read_text())["rows"]:
        named = experiment.data[kept["data"]].split_hash
        assert (kept["rule"]["split_hash"] == named) is (kept["name"] not in own), kept["name"]


def test_what_the_readme_says_of_slices_is_expected() -> None:
    """Its figures could be others with every row reproduced, were not the slice expected."""
    columns, rows = SUMMARIES["readme"]
    parts = [column for column in columns if column.part is not None]
    assert parts
    for column in parts:
        experiment = Experiment.load(column.experiment)
        runs = {run.name: run for run in experiment.runs}
        content = json.loads((results.FIGURES / f"{column.experiment}.json").read_text())
        kept = {row["name"]: row for row in content["rows"]}
        for name in filter(None, (names.get(column.experiment) for names in rows.values())):
            expected = runs[name].expected[column.part]
            measured = kept[name]["slices"][column.part][1]
            assert abs(measured - expected) <= runs[name].tolerance + 1e-9, name


def test_a_changed_figure_is_seen() -> None:
    text = results.PAGES[0].read_text(encoding="utf-8")
    figure = re.search(r"\|(0\.\d{4}) \[", text)
    assert figure is not None
    changed = text.replace(figure[1], "0.9999", 1)
    assert results.with_tables(changed) == text


def test_a_table_is_put_in_its_place_with_what_was_not_run(tmp_path: Path) -> None:
    content = json.loads((results.FIGURES / "sample.json").read_text())
    content["rows"] = content["rows"][1:]  # without the first of the experiment
    content["rows"][0]["name"] = "a new name"
    (tmp_path / "sample.json").write_text(json.dumps(content))
    page = "before\n<!-- reproduced: sample -->\nto be replaced\n<!-- end -->\nafter\n"
    made = results.with_tables(page, tmp_path)
    assert made.startswith("before\n<!-- reproduced: sample -->\n\n`recformer reproduce sample`: ")
    assert made.endswith("<!-- end -->\nafter\n")
    assert "|a new name|" in made
    assert "|popularity|NDCG@10 0.0349|5e-05|0.2|" in made.split("|not run here|")[1]
    assert "to be replaced" not in made
    assert results.with_tables(made, tmp_path) == made
    # Where nothing was run the page says so of every row.
    (tmp_path / "sample.json").unlink()
    assert results.with_tables(page, tmp_path).count("|5e-05|0.2|") == 3


def test_rows_side_by_side(tmp_path: Path) -> None:
    """Measured rows with the slice and the deviation that a column shows, best first; in brackets
    what is expected of one that was not run."""
    page = "<!-- summary: method -->\n<!-- end -->\n"
    content = json.loads((results.FIGURES / "scientific.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    rows["TF-IDF"]["figures"]["NDCG@10"][0] = 0.5
    rows["TF-IDF"]["slices"]["rare target"] = [4, 0.25]
    content["rows"] = [rows["head"], rows["TF-IDF"]]
    (tmp_path / "scientific.json").write_text(json.dumps(content))
    lines = results.with_tables(page, tmp_path).splitlines()
    assert lines[4].startswith("|TF-IDF|.5000 / .1118|.2500|(.0543 / .1129)||(.0205 / .0480)|")
    assert lines[5].startswith("|`--method head`|.1038 ± .0013 / .1522 ± .0017|.0471|(.0981 / ")
    assert any(line.startswith("|co-occurrence|(.0736 / .1070)||(") for line in lines)


@pytest.mark.parametrize("name", ["README.md", "method.md"])
def test_what_the_tables_of_models_say_is_in_files(name: str) -> None:
    """The README has no other table of figures, and what method.md brings is no typed one."""
    (page,) = (page for page in results.PAGES if page.name == name)
    text = page.read_text(encoding="utf-8")
    heading = {"README.md": "## Results", "method.md": "## What it brings"}[name]
    assert heading in text
    part = results.TABLE.sub("", text.partition(heading)[2]).split("\n#")[0]
    assert not re.findall(r"^\|.*", part, re.MULTILINE)


def speed(**others: Any) -> dict[str, Any]:
    rows = [
        {"benchmark": "one", **row("a", 0.5, "peer", 1.25, amount=100, unit="items", note="said")},
        {"benchmark": "two", **row("c", 1234.5)},
    ]
    return {"machine": MACHINE | others, "rows": rows}


def test_benchmarks_are_kept_and_shown(tmp_path: Path) -> None:
    pieces = [tmp_path / "1.json", tmp_path / "2.json"]
    pieces[0].write_text(json.dumps(speed()))
    more = speed(load_before=0.9) | {"rows": [{"benchmark": "one", **row("b|<s>", 2.0)}]}
    pieces[1].write_text(json.dumps(more))
    kept = results.take(pieces, tmp_path)
    assert kept == [tmp_path / "speed" / "one.json", tmp_path / "speed" / "two.json"]
    assert results.benchmark("one", tmp_path) == (
        "`python -m benchmarks one`\n\n"
        "| |ours s|a second|peer s|ratio||\n|---|---|---|---|---|---|\n"
        "|a|0.5|200 items|1.25|2.50|said|\n|b\\|`<s>`|2|||||\n\n"
        "A CPU, AMX, 2 threads, load before 0.9; torch 2, transformers 5; 2026-01-02\n"
    )
    assert "|c|1,234|" in results.benchmark("two", tmp_path)
    assert "not measured" in results.benchmark("three", tmp_path)
    (tmp_path / "3.json").write_text(json.dumps(speed(load_before=None)))
    results.take([tmp_path / "3.json"], tmp_path)
    assert results.benchmark("two", tmp_path).endswith(
        "\nA CPU, AMX, 2 threads; torch 2, transformers 5; 2026-01-02\n"
    )


def test_commands_and_versions_of_peers_are_named(tmp_path: Path) -> None:
    rows = [{"benchmark": "one", **row("a", 1.0, "faiss.IndexFlatIP", 2.0)}]
    content = speed(**{"faiss-cpu": "9", "isa": ["avx2", "avx512_bf16"]})
    content |= {"rows": rows, "commands": {"one": "python -m benchmarks.one --peer PYTHON"}}
    (tmp_path / "1.json").write_text(json.dumps(content))
    results.take([tmp_path / "1.json"], tmp_path)
    shown = results.benchmark("one", tmp_path)
    assert shown.startswith("`python -m benchmarks.one --peer PYTHON`\n")
    assert (
        "A CPU, AVX512_BF16, 2 threads, load before 0.1; torch 2, transformers 5, faiss-cpu 9; "
        in shown
    )


def test_stages_are_shares_side_by_side(tmp_path: Path) -> None:
    assert "not measured" in results.benchmark("stages", tmp_path)
    rows = [
        {"benchmark": "stages", **row(what, 0.25, note=note)}
        for what, note in (
            ("MiniLM, items, float32", ""),
            ("MiniLM, items, float32: GELU", "60.0%"),
            ("MiniLM, items, float32: what <s> gathers", "40.0%"),
            ("MiniLM, items, bfloat16", ""),
            ("MiniLM, items, bfloat16: what <s> gathers", "100.0%"),
            ("MiniLM, items, training step, float32", ""),
            ("MiniLM, items, training step, float32: AdamW", "100.0%"),
        )
    ]
    (tmp_path / "1.json").write_text(json.dumps(speed() | {"rows": rows}))
    results.take([tmp_path / "1.json"], tmp_path)
    assert results.benchmark("stages", tmp_path) == (
        "`python -m benchmarks stages`\n\n"
        "|MiniLM, items|float32, 0.25 s|bfloat16, 0.25 s|\n|---|---|---|\n"
        "|GELU|60.0%||\n|what `<s>` gathers|40.0%|100.0%|\n\n"
        "|MiniLM, items, training step|float32, 0.25 s|\n|---|---|\n|AdamW|100.0%|\n\n"
        "A CPU, AMX, 2 threads, load before 0.1; torch 2, transformers 5; 2026-01-02\n"
    )


def test_threads_are_part_of_the_name_and_machines_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text(json.dumps(speed(threads=1)))
    kept = results.take([tmp_path / "1.json"], tmp_path)
    assert [path.name for path in kept] == ["one_1.json", "two_1.json"]
    shown = results.benchmark("one_1", tmp_path)
    assert shown.startswith("`python -m benchmarks one --threads 1`\n")
    assert "1 thread," in shown
    (tmp_path / "2.json").write_text(json.dumps(speed(threads=1, cpu="Another")))
    with pytest.raises(UserError, match="pieces of one are of two machines"):
        results.take([tmp_path / "1.json", tmp_path / "2.json"], tmp_path)
    (tmp_path / "3.json").write_text("{}")
    with pytest.raises(UserError, match="nothing that was measured"):
        results.take([tmp_path / "3.json"], tmp_path)
    with pytest.raises(UserError, match="no file, and no folder"):
        results.take([tmp_path], tmp_path)
