"""`recformer reproduce`: what it refuses, and says rather than leave it out of a table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from baselines import reproduce
from baselines.experiment import Experiment
from baselines.reproduce import main
from baselines.reproduction import DONE
from recformer.files import UserError, read_json
from scripts.results import take
from tests.baselines.test_reproduce import place  # noqa: F401

FLAGS = ["shop.yaml", "--raw", "raw files", "--output_dir", "out"]


def test_a_damaged_record_is_said_and_its_row_not_taken_as_it_is(place, capsys):  # noqa: F811
    main(FLAGS)
    record = Path("out/runs/shop/popularity") / DONE
    whole = record.read_text()
    record.write_text(whole[:40])
    said = r"popularity/reproduced.json cannot be read: remove its folder, .* or that file alone"
    capsys.readouterr()
    with pytest.raises(UserError, match=f"^failed: popularity .*{said}"):
        main([*FLAGS, "--table"])
    assert [row["name"] for row in read_json("out/reproduction.json")["rows"]] == ["sasrec"]
    with pytest.raises(UserError, match=said):
        main(FLAGS)
    with pytest.raises(UserError, match=said):  # also where another row is asked for
        main([*FLAGS, "--only", "sasrec"])
    assert record.read_text() == whole[:40]
    # Without the file its figures are no row of a table until the command takes them.
    record.unlink()
    capsys.readouterr()
    main([*FLAGS, "--table"])
    assert "not in the table: popularity (figures without their reproduced.json)" in (
        capsys.readouterr().out
    )
    main(FLAGS)
    rows = {row["name"]: row for row in read_json("out/reproduction.json")["rows"]}
    assert rows["popularity"]["made"]["machine"] == "machine not recorded"


def test_rows_that_nothing_is_there_of_are_counted(place, capsys):  # noqa: F811
    main([*FLAGS, "--only", "popularity"])
    assert "not made yet: 1 of 2 rows\n" in capsys.readouterr().out
    main([*FLAGS, "--only", "sasrec"])
    assert "not made yet" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "rows", "said"),
    [
        ("num_train_epochs: 1", "num_train_epochs: 2", [],
         r"sasrec was made otherwise \(other flags\): remove it"),
        ("process:", "process:\n      protocol: temporal", ["--only", "popularity"],
         r"data/shop was made otherwise \(other process\): remove it"),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_the_run_would(place, capsys, old, new, rows, said):  # noqa: F811
    main([*FLAGS, "--only", "sasrec"])
    Path("shop.yaml").write_text(Path("shop.yaml").read_text().replace(old, new))
    there = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    reproduce.ran.clear()
    for dry in (["--dry_run"], []):
        capsys.readouterr()
        with pytest.raises(UserError, match=said):
            main([*FLAGS, *rows, *dry])
        assert capsys.readouterr().out == ""
    assert reproduce.ran == []
    assert there == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: popularity", "model: popularity\n      history_factor: 0.5",
         "^shop.yaml, run popularity: --history_factor is no flag of --model popularity"),
        ("model: sasrec", "model: sasrek",
         "^shop.yaml, run sasrec: argument --model: invalid choice: 'sasrek' .choose from "),
        ("num_train_epochs: 1", "num_train_epochs: one", "^shop.yaml, run sasrec: argument --num_"),
        ("model: sasrec", "model: sasrec\n      help: true", "^shop.yaml, run sasrec: .* is no "),
    ],
)  # fmt: skip
def test_flags_that_a_command_does_not_take_are_said_with_their_row(
    place, capsys, old, new, said  # noqa: F811
):  # fmt: skip
    Path("shop.yaml").write_text(Path("shop.yaml").read_text().replace(old, new))
    for flags in ([*FLAGS, "--dry_run"], FLAGS):
        with pytest.raises(UserError, match=said):
            main(flags)
    assert "usage:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": {}}, "^shop.yaml: no rows; expected runs, or steps with something expected"),
        ({"runs": {"a": {"expect": {"MRR": 1}}}}, "run a: expect; expected of command, data,"),
        ({"runs": {"a": {}}}, "^shop.yaml is no experiment: run a: lacks expected"),
        ({"runs": {"a": {"expected": 1}}}, "run a: expected is 1, expected NAME: VALUE"),
        ({"runs": {"a": {"seeds": 3}}}, "run a: 'int' object is not iterable"),
        ({"data": {"shop": {"splithash": 1}}}, "data shop: splithash; expected of process,"),
        ({"steps": {"a": {"commands": ["'"]}}}, "step a: No closing quotation"),
    ],
)  # fmt: skip
def test_what_has_another_form_is_said_with_its_row(place, change, said):  # noqa: F811
    content = yaml.safe_load(Path("shop.yaml").read_text())
    Path("shop.yaml").write_text(yaml.safe_dump(content | change))
    for flags in ([], ["--table"]):
        with pytest.raises(UserError, match=said):
            main(["shop.yaml", *flags])


@pytest.mark.parametrize("name", ["a/../b", "a\\b", "..", ".hidden", "", " a", "a ", "a\nb", 2])
@pytest.mark.parametrize("part", ["data", "runs", "steps"])
def test_names_are_those_of_folders(place, part, name):  # noqa: F811
    content = yaml.safe_load(Path("shop.yaml").read_text())
    content["steps"] = {"step": {"commands": ["x"]}}
    content[part][name] = next(iter(content[part].values()))
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=r"the name is .*, expected that of a folder"):
        Experiment.load("shop.yaml")
    content[part]["T4R + (text), 2.0"] = content[part].pop(name)
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    Experiment.load("shop.yaml")


def test_no_table_stays_of_which_no_row_is_finished(place):  # noqa: F811
    only = [*FLAGS, "--only", "popularity"]
    main(only)
    files = [Path(f"out/reproduction{ending}") for ending in (".md", ".tex", ".csv", ".json")]
    assert all(file.is_file() for file in files)
    # A table of another experiment may be right: nobody knows here.
    Path("other.yaml").write_text(Path("shop.yaml").read_text().replace("popularity:", "other:"))
    with pytest.raises(UserError, match="no row is finished in out"):
        main(["other.yaml", "--output_dir", "out", "--table"])
    assert all(file.is_file() for file in files)
    # Its texts changed: the data fail, and every row with them.
    items = Path("out/data/shop/meta_data.json")
    items.write_text(items.read_text().replace("product 1", "product 7"))
    shutil.rmtree("out/runs")
    with pytest.raises(UserError, match="^failed: shop .*; the table that lay there is removed"):
        main(only)
    assert not any(file.exists() for file in files)
    with pytest.raises(UserError, match="no file, and no folder of"):
        take([Path("out")], place / "figures")
    # The same where nothing is run, and where the file of the table is damaged.
    for damaged in ("{", "[]"):
        files[-1].write_text(damaged)
        with pytest.raises(UserError, match="^no row is finished .*; the table .* is removed"):
            main([*only, "--table"])
    with pytest.raises(
        UserError, match="^no row is finished in out: without --table they are made$"
    ):
        main([*only, "--table"])


def test_a_table_of_other_flags_stays(place):  # noqa: F811
    main([*FLAGS, "--only", "popularity"])
    text = Path("out/reproduction.md").read_text()
    content = yaml.safe_load(Path("shop.yaml").read_text())
    content["runs"]["popularity"]["flags"]["metric_ks"] = [5, 10]
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="made otherwise: other [^;]*$"):
        main([*FLAGS, "--table"])
    assert Path("out/reproduction.md").read_text() == text
