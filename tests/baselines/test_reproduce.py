"""`recformer reproduce`: what is run, what is kept, and when a row counts as reproduced."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from baselines import reproduce, reproduction
from baselines.experiment import DATA_FILES, FOLDER, Experiment
from baselines.reproduce import main
from baselines.reproduction import DONE, Reproduction
from recformer.__main__ import COMMANDS
from recformer.files import UserError, read_json, write_json
from recformer.preparation.sample_season import write_season

CLICKS = "user,item,time\n" + "".join(
    f"u{user},i{(user + step) % 5},{step}\n" for user in range(6) for step in range(5)
)
ITEMS = "item,title\n" + "".join(f"i{item},product {item}\n" for item in range(5))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with raw files and an experiment; commands run in this process."""
    raw = tmp_path / "raw files" / "deep"
    raw.mkdir(parents=True)
    (raw / "clicks.csv").write_text(CLICKS)
    (raw / "items.csv").write_text(ITEMS)
    content = {
        "title": "Six users",
        "hardware": "any",
        "data": {
            "shop": {
                "process": {"file_path": "clicks.csv", "meta_file_path": "items.csv"},
                "sha256": {"clicks.csv": hashlib.sha256(CLICKS.encode()).hexdigest()},
                "minutes": 0.5,
            }
        },
        "run": {"data": "shop", "command": "baseline", "tolerance": 0.00005, "minutes": 2},
        "runs": {
            # Every user's fifth item follows: of five items, four in the history and kept.
            "popularity": {"flags": {"model": "popularity"}, "expected": {"Recall@10": 1.0}},
            "sasrec": {
                "flags": {"model": "sasrec", "hidden_size": 8, "num_heads": 1, "device": -1,
                          "num_train_epochs": 1},
                "seeds": [1, 2], "expected": {"Recall@10": 1.0},
            },
        },
    }  # fmt: skip
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    tables = {name: entry[0] for group in COMMANDS.values() for name, entry in group.items()}

    def in_this_process(line: list[str], environment: object = None) -> int:
        command, flags = line[line.index("recformer") + 1], line[line.index("recformer") + 2 :]
        ran.append(command)
        import_module(tables[command]).main(flags)
        return 0

    ran: list[str] = []
    monkeypatch.setattr(reproduction, "run_command", in_this_process)
    monkeypatch.setattr("recformer.training.seeds.run_command", in_this_process)
    monkeypatch.setattr(reproduce, "ran", ran, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_is_made_once_and_judged(place, capsys):
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out"]
    main([*flags, "--dry_run"])
    said = capsys.readouterr().out
    assert "|data shop|process|0.5|" in said
    assert "|all|any|6.5|" in said
    assert not Path("out").exists()
    main(flags)
    assert reproduce.ran == ["process", "baseline", "baseline", "baseline", "baseline"]
    content = read_json("out/reproduction.json")
    assert [(row["name"], row["verdict"]) for row in content["rows"]] == [
        ("popularity", "reproduced"), ("sasrec", "reproduced"),
    ]  # fmt: skip
    assert content["rows"][1]["seeds"] == [1, 2]
    assert content["rows"][1]["figures"]["Recall@10"][0] == 1
    assert Path("out/reproduction.md").read_text() in capsys.readouterr().out
    # Again: nothing is run, and the dry run says so.
    reproduce.ran.clear()
    main(flags)
    assert reproduce.ran == []
    capsys.readouterr()
    main([*flags, "--dry_run"])
    assert "|all|any|0.0|" in capsys.readouterr().out


def test_a_row_that_differs_fails_and_is_named(place):
    text = Path("shop.yaml").read_text().replace("Recall@10: 1.0", "Recall@10: 0.5", 1)
    Path("shop.yaml").write_text(text)
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "popularity"]
    with pytest.raises(UserError, match="not as expected: popularity"):
        main(flags)
    (row,) = read_json("out/reproduction.json")["rows"]
    assert row["verdict"] == "differs: Recall@10 +0.5000"
    with pytest.raises(UserError, match="--only other: expected of popularity, sasrec"):
        main([*flags[:-1], "other"])


def test_changed_flags_do_not_report_the_run_before(place):
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "sasrec"]
    main(flags)
    text = Path("shop.yaml").read_text()
    Path("shop.yaml").write_text(text.replace("num_train_epochs: 1", "num_train_epochs: 2"))
    with pytest.raises(UserError, match=r"sasrec was made otherwise \(other flags\): remove it"):
        main(flags)
    # A changed recipe of the data is noticed as well.
    Path("shop.yaml").write_text(text.replace("process:", "process:\n      protocol: temporal"))
    with pytest.raises(UserError, match=r"sasrec was made otherwise \(other data\)"):
        main(flags)
    with pytest.raises(UserError, match=r"data/shop was made otherwise \(other process\)"):
        main([*flags[:-1], "popularity"])
    # So are texts that changed, and rows of data that were made anew from other files.
    Path("shop.yaml").write_text(text)
    items = Path("out/data/shop/meta_data.json")
    before = items.read_text()
    items.write_text(before.replace("product 1", "product 7"))
    with pytest.raises(UserError, match="failed: shop .*data/shop was changed since it was made"):
        main(flags)
    items.write_text(before)
    (Path("out/data/shop") / DONE).unlink()
    with pytest.raises(UserError, match="out/data/shop does not say of which recipe it is"):
        main(flags)
    shutil.rmtree("out/data/shop")
    (place / "raw files" / "deep" / "items.csv").write_text(ITEMS.replace("product", "thing"))
    main([*flags[:-1], "popularity"])
    with pytest.raises(UserError, match=r"sasrec was made otherwise \(other content of the data\)"):
        main(flags)
    assert [row["name"] for row in read_json("out/reproduction.json")["rows"]] == ["popularity"]


def test_data_that_were_cut_off_in_their_audit_are_taken(place):
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "popularity"]
    main(flags)
    record = Path("out/data/shop") / DONE
    content = read_json(record)
    write_json(record, {"recipe": content["recipe"], "made": None})
    main(flags)
    assert read_json(record)["content"] == content["content"]


def test_no_row_is_the_mean_of_some_of_its_seeds(place, monkeypatch):
    main(["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "sasrec"])
    every = reproduction.find_runs

    def without_the_last(folder: Path) -> list[tuple[Path, str, str]]:
        return [run for run in every(folder) if run[0].name != "seed_2"]

    monkeypatch.setattr(reproduction, "find_runs", without_the_last)
    with pytest.raises(UserError, match="has not the figures of every seed"):
        main(["shop.yaml", "--table", "--output_dir", "out"])


def test_seeds_may_be_added_and_a_typo_mended(place, capsys):
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "sasrec"]
    text = Path("shop.yaml").read_text()
    Path("shop.yaml").write_text(
        text.replace("model: sasrec", "model: sasrec\n      loss: in_batc")
    )
    with pytest.raises(UserError, match="in_batc"):
        main(flags)
    Path("shop.yaml").write_text(text)
    main(flags)
    reproduce.ran.clear()
    Path("shop.yaml").write_text(text.replace("- 2", "- 2\n    - 3"))
    main(flags)
    assert reproduce.ran[0] == "baseline"
    assert read_json("out/reproduction.json")["rows"][0]["seeds"] == [1, 2, 3]
    # When and where: of what was there before too, and of nothing else if nothing was made.
    record = Path("out/runs/shop/sasrec") / DONE
    content = read_json(record)
    content["made"] |= {"date": "2020-02-02", "machine": "another"}
    write_json(record, content)
    main(flags)
    assert read_json(record)["made"] == content["made"]
    Path("shop.yaml").write_text(text.replace("- 2", "- 2\n    - 3\n    - 4"))
    main(flags)
    made = read_json(record)["made"]
    assert made["date"].startswith("2020-02-02 and 20")
    assert made["machine"].startswith("another and ")
    assert made["versions"] == content["made"]["versions"]
    # A row of another recipe is said to be left out, and one that was asked for is missed.
    main([*flags[:-1], "popularity"])
    capsys.readouterr()
    Path("shop.yaml").write_text(text.replace("hidden_size: 8", "hidden_size: 16"))
    main([*flags[:-2], "--table"])
    assert "not in the table: sasrec (made otherwise: other flags)" in capsys.readouterr().out
    with pytest.raises(UserError, match="not made: sasrec"):
        main([*flags, "--table"])


def test_records_of_another_form_are_refused(place):
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "popularity"]
    main(flags)
    record = Path("out/runs/shop/popularity") / DONE
    content = read_json(record)
    cut = {"date": "2026-01-01", "versions": {}}
    for other in (
        [], {"recipe": 1, "made": 2}, {"recipe": {}, "made": content["made"]},
        content | {"made": cut},
    ):  # fmt: skip
        write_json(record, other)
        with pytest.raises(UserError, match=r"popularity/reproduced.json cannot be read: remove"):
            main(flags)
        assert read_json(record) == other
    record.unlink()
    main(flags)
    assert read_json(record)["recipe"] == content["recipe"]
    write_json(Path("out/data/shop") / DONE, {"recipe": {}, "made": {"date": ""}})
    with pytest.raises(UserError, match="out/data/shop does not say of which recipe it is"):
        main(flags)


def test_another_value_in_place_of_a_flags(place, tmp_path):
    Path("shop.yaml").write_text(
        Path("shop.yaml")
        .read_text()
        .replace("model: popularity", "model: popularity\n      ties: expected")
    )
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "popularity"]
    with pytest.raises(UserError, match="--replace 8=…: no flag of shop has that text"):
        main([*flags, "--replace", "8=16"])  # a number
    main([*flags, "--replace", "expected=pessimistic"])
    text = Path("out/reproduction.md").read_text()
    assert "; with another expected (--replace)\n" in text
    main([*flags, "--table"])  # the row stays, also without the flag
    assert Path("out/reproduction.md").read_text() == text
    other = r"popularity was made otherwise \(other --replace: expected=pessimistic\): remove it"
    with pytest.raises(UserError, match=other):
        main([*flags, "--replace", "expected=optimistic"])
    # What is not whole is not gone on with without it.
    (Path("out/runs/shop/popularity") / "metrics.json").unlink()
    with pytest.raises(UserError, match=other):
        main(flags)
    main([*flags, "--replace", "expected=pessimistic"])
    Path("folder").mkdir()
    given = reproduction.Reproduction(Experiment.load("shop.yaml"), Path("out"), [],
                                      {"expected": f"../{tmp_path.name}/folder"})  # fmt: skip
    assert given.replaced == {"expected": str(tmp_path / "folder")}


def test_a_moved_folder_goes_on_and_lost_files_are_made_again(place, capsys):
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir"]
    main([*flags, "out"])
    Path("out").rename("elsewhere")
    reproduce.ran.clear()
    main([*flags, str(place / "elsewhere")])
    assert reproduce.ran == []
    main(["shop.yaml", "--output_dir", "elsewhere", "--table"])  # without the raw files
    run = Path("elsewhere/runs/shop/popularity")
    (run / DONE).unlink()
    main([*flags, "elsewhere"])
    assert reproduce.ran == ["baseline"]
    content = read_json("elsewhere/reproduction.json")
    assert {"date", "machine", "versions"} == content["rows"][0]["made"].keys() - {"commit"}
    assert reproduce.origin(content) in Path("elsewhere/reproduction.md").read_text()
    assert reproduce.origin(content).count("recformer") == 1
    content["rows"][0]["made"] = content["rows"][0]["made"] | {"date": "2020-02-02"}
    lines = [line for line in reproduce.origin(content).splitlines() if line.startswith("- ")]
    assert lines[0].startswith("- popularity: ")
    assert lines[0].endswith("; 2020-02-02")
    assert lines[1].startswith("- sasrec: ")
    # Rows of another rule are no rows of one table.
    assert len(reproduce.tables_of(content)) == 1
    content["rows"][0]["rule"] = content["rows"][0]["rule"] | {"split_hash": "another"}
    captions = [caption for caption, *_ in reproduce.tables_of(content)]
    assert captions[0].startswith("shop: split another,")
    assert len(captions) == 2
    # A record that was lost: the row is of the day when its figures were written.
    os.utime(run / "metrics.json", (86400 * 366, 86400 * 366))
    (run / DONE).unlink()
    main([*flags, "elsewhere"])
    made = read_json(run / DONE)["made"]
    assert made == {"date": "1971-01-02", "machine": "machine not recorded", "versions": {}}
    assert "machine not recorded; 1971-01-02" in Path("elsewhere/reproduction.md").read_text()
    (run / "metrics.json").unlink()
    main([*flags, "elsewhere"])  # evaluated again
    # A damaged row is named, and the others stand in the table.
    (run / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="failed: popularity .*has not the figures of a row"):
        main(["shop.yaml", "--output_dir", "elsewhere", "--table"])
    (run / "metrics.json").unlink()
    main([*flags, "elsewhere"])
    shutil.rmtree(run / "ranks")
    with pytest.raises(UserError, match="popularity has no figures or ranks though its .*: remove"):
        main([*flags, "elsewhere"])
    assert [row["name"] for row in read_json("elsewhere/reproduction.json")["rows"]] == ["sasrec"]


def test_a_row_that_fails_stops_no_other_and_the_table_has_all_that_are_finished(place, capsys):
    content = yaml.safe_load(Path("shop.yaml").read_text())
    wrong = {"model": "text_neighbours", "text_encoder": "there/is/none"}
    content["runs"] = {
        "first": {"flags": wrong, "expected": {"Recall@10": 1.0}},
        "after it": {"of": "first", "expected": {"Recall@10": 1.0}},
        **content["runs"],
    }
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out"]
    with pytest.raises(
        UserError, match=r"failed: first \(.*there/is/none.*after it \(first failed"
    ):
        main(flags)
    names = [row["name"] for row in read_json("out/reproduction.json")["rows"]]
    assert names == ["popularity", "sasrec"]
    # --only makes one row; the table keeps the others.
    main([*flags, "--only", "popularity"])
    names = [row["name"] for row in read_json("out/reproduction.json")["rows"]]
    assert names == ["popularity", "sasrec"]
    lines = Path("out/reproduction.csv").read_text().splitlines()
    assert lines[0].startswith("data,name,seeds,NDCG@10,NDCG@10 low")
    assert len(lines) == 3
    assert Path("out/reproduction.tex").read_text().count("\\begin{tabular}") == 1


def test_a_row_that_comes_with_another_has_it_made(place, capsys):
    content = yaml.safe_load(Path("shop.yaml").read_text())
    content["runs"]["beside"] = {"of": "sasrec", "expected": {"Recall@10": 1.0}}
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "beside"]
    main([*flags, "--dry_run"])
    said = capsys.readouterr().out
    assert "|beside|comes with sasrec|0|" in said
    assert "|all|any|4.5|" in said
    main(flags)
    rows = {row["name"]: row for row in read_json("out/reproduction.json")["rows"]}
    assert rows["beside"]["seeds"] == [1, 2]
    content["runs"]["beside"]["seeds"] = [3]
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=r"run beside: seeds \(3,\), sasrec has \(1, 2\)"):
        Experiment.load("shop.yaml")


def test_folders_and_values_that_are_not_there_are_said(place):
    with pytest.raises(UserError, match="--raw nowhere: no such folder"):
        main(["shop.yaml", "--raw", "nowhere", "--dry_run"])
    with pytest.raises(UserError, match="--replace nonsense=…: no flag of shop has that text"):
        main(["shop.yaml", "--replace", "nonsense=x", "--dry_run"])
    Path("shop.yaml").write_text(Path("shop.yaml").read_text().replace("model: p", "modell: p"))
    with pytest.raises(UserError, match="--modell is no flag"):
        main(["shop.yaml", "--dry_run"])


def test_a_name_is_no_pattern_and_flags_are_checked_first(place):
    text = Path("shop.yaml").read_text()
    Path("shop.yaml").write_text(text.replace("clicks.csv", "clicks[1].csv"))
    (place / "raw files" / "deep" / "clicks.csv").rename(place / "raw files" / "clicks1.csv")
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out"]
    with pytest.raises(FileNotFoundError, match=r"clicks\[1\].csv of shop is in no folder"):
        main(flags)
    (place / "raw files" / "clicks1.csv").rename(place / "raw files" / "clicks[1].csv")
    text = Path("shop.yaml").read_text()
    Path("shop.yaml").write_text(text.replace("hidden_size: 8", "hidden_sise: 8"))
    with pytest.raises(UserError, match="--hidden_sise is no flag.*is it --hidden_size"):
        main(flags)
    assert not Path("out").exists()


def test_raw_files_must_be_there_and_right(place, capsys):
    flags = ["shop.yaml", "--output_dir", "out"]
    with pytest.raises(FileNotFoundError, match="clicks.csv of shop is in no folder of --raw"):
        main(flags)
    main([*flags, "--dry_run"])  # what it costs is said before the files are looked for
    said = capsys.readouterr().out
    assert "|data shop|cannot be made: clicks.csv of shop is in no folder of --raw;" in said
    assert "|all|any|6.5|" in said
    (place / "raw files" / "deep" / "clicks.csv").write_text(CLICKS + "u7,i1,9\n")
    with pytest.raises(UserError, match="is not the file that shop was made of"):
        main([*flags, "--raw", "raw files"])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("data: shop", "data: other", "no data 'other'"),
        ("command: baseline", "command: rm", "command 'rm', expected baseline, finetune"),
        ("data: shop", "data: shop\n  evaluation: stage1", "'stage1', expected zero_shot or none"),
        (
            "Recall@10: 1.0",
            "Recall@7: 1.0",
            "expected Recall@7; of NDCG@10, .*, MRR, cold",
        ),
        ("Recall@10: 1.0", "cold: 1.0", "expected cold; of .*, cold target, .*, new target"),
        ("Recall@10: 1.0", "cold target: x", "expected cold target is 'x', expected a number"),
        ("tolerance: 5.0e-05", "tolerance: 5e-5", "tolerance is '5e-5', expected a number .YAML"),
        ("tolerance: 5.0e-05", "tolerance: .inf", "tolerance is inf, expected a number"),
        ("tolerance: 5.0e-05", "tolerance: -1", "tolerance is -1, expected 0 or more"),
        ("Recall@10: 1.0", "Recall@10: .nan", "expected Recall@10 is nan, expected a number"),
        ("Recall@10: 1.0", "Recall@10: abc", "expected Recall@10 is 'abc', expected a number"),
        ("minutes: 0.5", "minutes: a lot", "data shop: minutes is 'a lot'"),
        ("- 2", "- 1", r"seeds \[1, 1\], expected other whole numbers"),
        ("- 2", "- a", r"seeds \[1, 'a'\], expected other whole numbers"),
        ("file_path: clicks.csv", "file: clicks.csv", "process is .*expected file_path: NAME"),
        ("command: baseline", "command: baseline\n  evaluation: zero_shot", "which a baseline has"),
        ("flags:\n      model: popularity", "flags: null", "is no experiment"),
        ("popularity:", "shop:", "run shop: data have that name"),
        ("title:", "titel:", "is no experiment"),
        ("title:", "test: {}\ntitle:", "is no experiment: test; expected of title, "),
        ("title: Six users", "", "is no experiment: 'title'"),
        ("title:", "title: [", "is no YAML"),
    ],
)
def test_files_of_another_form_are_refused(place, old, new, said):
    Path("shop.yaml").write_text(Path("shop.yaml").read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        Experiment.load("shop.yaml")


def test_steps_come_before_the_rows_that_need_them(place, monkeypatch, capsys):
    content = yaml.safe_load(Path("shop.yaml").read_text())
    process = "process --file_path {shop.file_path} --meta_file_path {shop.meta_file_path}"
    content["steps"] = {
        "first": {"commands": [f"{process} --output_path {{here}}/copy"], "minutes": 3},
        "codes": {
            "commands": ["semantic-ids --data_path {first}/copy --output_dir {here}"],
            "expected": {"entropy": 0.5, "colliding_items": 10},
            "minutes": 4,
        },
        "other": {
            "commands": ["semantic-ids --data_path {first}/copy --output_dir {here}"],
            "expected": {"colliding_items": 1},
        },
    }
    content["runs"]["popularity"]["flags"]["text_encoder"] = "{codes}/x"
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    ran = []

    def run(line):
        ran.append(line[line.index("recformer") + 1 :])
        if ran[-1][0] == "semantic-ids":
            figures = {"items": 5, "seconds": {"fit": 30.0}, "entropy": [0.9, 0.53],
                       "reconstruction_error": [0.25, 0.125], "usage": [1.0, 0.5],
                       "colliding_items": 9, "largest_collision": 2}  # fmt: skip
            write_json(Path("out/steps/codes/report.json"), figures)
        return 0

    monkeypatch.setattr(reproduction, "run_command", run)
    monkeypatch.setattr(reproduction, "checked", lambda command, words: None)
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out", "--only", "codes"]
    with pytest.raises(UserError, match="no row is finished in out"):
        main([*flags, "--table"])
    main([*flags, "--dry_run"])
    assert "|all|any|7.0|" in capsys.readouterr().out
    main(flags)
    raw = Path("raw files/deep")
    assert ran == [
        ["process", "--file_path", str(raw / "clicks.csv"), "--meta_file_path",
         str(raw / "items.csv"), "--output_path", "out/steps/first/copy"],
        ["semantic-ids", "--data_path", "out/steps/first/copy", "--output_dir", "out/steps/codes"],
    ]  # fmt: skip
    table = "|codes|5|0.250 0.125|100.0% 50.0%|0.90 0.53|9|2|0.5|reproduced|"  # 6 and 10 % off
    assert table in capsys.readouterr().out
    main([*flags[:-2], "--table"])  # of all rows the one that is there
    assert table in capsys.readouterr().out
    assert len(ran) == 2
    # A run that reads a step's folder has it made, and has the folder in its flags.
    experiment = Experiment.load("shop.yaml")
    popularity = next(run for run in experiment.runs if run.name == "popularity")
    data, raw_files, steps = experiment.needed([popularity])
    assert [step.name for step in steps] == ["first", "codes"]
    assert ([d.name for d in data], [d.name for d in raw_files]) == (["shop"], ["shop"])
    there = Reproduction(experiment, Path("out"), [], {})
    assert "out/steps/codes/x" in there.line(popularity)
    # With other commands of a step that comes before it a run is another one; of raw files that are
    # not found, or lie elsewhere, it is the same.
    there.folder(popularity).mkdir(parents=True)
    (there.folder(popularity) / "metrics.json").write_text("{}")
    (there.folder(popularity) / "ranks").mkdir()
    (there.folder(popularity) / "ranks" / "a_test.parquet").touch()
    there._mark(popularity, reproduction.provenance())
    assert there.made(popularity)
    changed = {"{first}/copy": "elsewhere"}
    assert not Reproduction(experiment, Path("out"), there.raw, changed).made(popularity)
    first = experiment.steps["first"]
    experiment.steps["first"] = replace(first, commands=[["env"]])
    assert not there.made(popularity)
    experiment.steps["first"] = first
    without = Reproduction(experiment, Path("out"), [], {})
    assert without.made(popularity)
    (there.folder(popularity) / DONE).unlink()
    for step in steps:
        (there.step_folder(step) / DONE).unlink()
    assert "cannot be had" in str(reproduce.plan(without, [popularity]))
    # What will be downloaded has its place in the plan.
    experiment.data["shop"] = replace(experiment.data["shop"], download="there")
    plan = reproduce.plan(without, [popularity])
    assert ["raw files of shop", "download", "0"] in plan
    assert "--file_path out/raw/shop/clicks.csv" in str(plan)
    for step in steps:
        there._mark(step, reproduction.provenance())
    report = Path("out/steps/codes/report.json")
    figures = report.read_text()
    report.write_text("{}")
    with pytest.raises(UserError, match="failed: codes .*report.json cannot be read"):
        main([*flags[:-2], "--table"])
    report.write_text(figures)
    text = Path("shop.yaml").read_text().replace("entropy: 0.5", "entropy: 0.4")
    Path("shop.yaml").write_text(text)
    with pytest.raises(UserError, match="not as expected: codes"):
        main([*flags, "--table"])
    assert read_json("out/reproduction.json")["steps"][0]["verdict"] == "differs: entropy +32.5%"


@pytest.mark.parametrize("word", ["{later}", "{shop.other}", "{none}", "{none.file_path}"])
def test_a_step_names_what_is_there(place, word):
    content = yaml.safe_load(Path("shop.yaml").read_text())
    content["steps"] = {
        "now": {"commands": [f"x {word}"]},
        "later": {"commands": ["y {now} {here}"]},
    }
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=f"step now: {word} is no data, no raw file and no step"):
        Experiment.load("shop.yaml")
    content["steps"] = {"shop": {"commands": ["x"]}}
    Path("shop.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="step shop: the name is taken"):
        Experiment.load("shop.yaml")


def test_an_audit_is_a_row(place, capsys):
    content = yaml.safe_load(Path("shop.yaml").read_text())
    del content["runs"], content["run"]
    command = "audit {shop} --output_dir {here}"
    content["steps"] = {
        "six users": {"commands": [command], "expected": {"users": 6, "interactions": 30},
                      "tolerance": 0.001},
        "again": {"commands": [command], "expected": {"targets": 5, "items": 5}},
    }  # fmt: skip
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out"]
    with pytest.raises(UserError, match="not as expected: again"):
        main(flags)
    heads, _, *lines = Path("out/reproduction.md").read_text().splitlines()[2:-2]
    assert heads.startswith("| |users|items|interactions|test targets|decided by ties in time|")
    assert [line.split("|")[1:6] for line in lines] == [
        ["six users", "6", "5", "30", "6"], ["again", "6", "5", "30", "6"]
    ]  # fmt: skip
    assert [line.split("|")[-2] for line in lines] == ["reproduced", "differs: targets +20.0%"]
    assert "six users & 6 & 5 & 30 & 6 & " in Path("out/reproduction.tex").read_text()
    assert "\nsix users,6,5,30,6," in Path("out/reproduction.csv").read_text()
    content["steps"]["again"]["expected"] = {"entropy": 0.5}
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="expected entropy; of users, items, interactions"):
        main(flags)
    content["steps"]["again"]["commands"] = []
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="step again: commands are .., expected some"):
        main(flags)


def test_metrics_and_pairs_that_are_tested(place, capsys):
    content = yaml.safe_load(Path("shop.yaml").read_text())
    content["metrics"] = ["MRR", "NDCG@2"]
    for run in content["runs"].values():
        run |= {"expected": {"MRR": 0.5}, "tolerance": 1}
    seen = {"flags": {"model": "popularity", "filter_seen": True}}
    content["runs"]["new items alone"] = content["runs"]["popularity"] | seen
    content["tests"] = {"trained and not": [["sasrec", "popularity"]]}
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    flags = ["shop.yaml", "--raw", "raw files", "--output_dir", "out"]
    main([*flags, "--only", "popularity"])
    found = read_json("out/reproduction.json")
    assert found["tests"] == []  # the other row is not there
    assert list(found["rows"][0]["figures"]) == found["metrics"] == ["MRR", "NDCG@2"]
    main([*flags, "--only", "sasrec"])
    (test,) = read_json("out/reproduction.json")["tests"]
    (pair,) = test["rows"]
    rows = {row["name"]: row["figures"] for row in read_json("out/reproduction.json")["rows"]}
    difference = rows["sasrec"]["MRR"][0] - rows["popularity"]["MRR"][0]
    assert pair["difference"] == pytest.approx(difference, abs=1e-12)
    assert pair["low"] <= difference <= pair["high"]
    assert 0 < pair["p"] <= 1
    text = Path("out/reproduction.md").read_text()
    assert "\ntrained and not: paired differences of MRR, 95 % bootstrap intervals" in text
    assert f"|sasrec|popularity|{difference:+.4f} [" in text
    lines = Path("out/reproduction.csv").read_text().splitlines()
    assert ",test," in lines[0]
    assert ",sasrec against popularity," in lines[-1]
    assert f",trained and not,{pair['difference']}," in lines[-1]
    content["tests"]["another rule"] = [["sasrec", "new items alone"]]
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="failed: sasrec against new items alone .other users, tar"):
        main(flags)
    assert len(read_json("out/reproduction.json")["rows"]) == 3  # which are written all the same
    for wrong, said in (
        ({"tests": {"a": [["sasrec", "none"]]}}, "tests, a: .'sasrec', 'none'., expected two of"),
        ({"tests": {"a": [["sasrec"]]}}, "tests, a: .'sasrec'., expected two of its runs"),
        ({"tests": {"a": [["sasrec", "sasrec"]]}}, "expected two of its runs, each pair once"),
        ({"tests": {"a": [["sasrec", "popularity"]] * 2}}, "expected two of its .* each pair once"),
        ({"tests": {1: []}}, "tests: .1., expected titles in words"),
        ({"metrics": ["NDCG"]}, "metrics: NDCG; expected NDCG@k"),
        ({"metrics": ["MRR", "MRR"]}, "metrics: MRR; expected .* each once"),
        ({"metrics": []}, "metrics are .., expected a list"),
        ({"metrics": "MRR"}, "metrics are 'MRR', expected a list"),
    ):
        Path("shop.yaml").write_text(yaml.safe_dump(content | wrong, sort_keys=False))
        with pytest.raises(UserError, match=said):
            Experiment.load("shop.yaml")


@pytest.mark.parametrize("data", [{"kind": "seasn", "sample": 0}, {"kind": "season"}])
def test_a_kind_of_sample_must_be_one(place, data):
    content = yaml.safe_load(Path("shop.yaml").read_text())
    content["data"]["shop"] |= data
    Path("shop.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=f"shop: kind '{data['kind']}', expected shop, season, "):
        Experiment.load("shop.yaml")


def test_a_season_is_generated_and_judged_by_session(place, monkeypatch):
    small = partial(write_season, days=3, sessions_a_day=60)
    monkeypatch.setattr("recformer.commands.sample.write_season", small)
    season = {"process": {"file_path": "season.csv", "split": "windows", "window": "1d",
                          "session_column": "user_session", "min_interactions": 2,
                          "targets": "every"}, "sample": 0}  # fmt: skip
    content = {
        "title": "A season", "hardware": "any", "metrics": ["NDCG@20"],
        "data": {"season": season | {"kind": "season"},
                 "shuffled": season | {"kind": "shuffled_season"}},
        "run": {"command": "baseline", "flags": {"model": "cooccurrence", "metric_ks": [20]},
                "tolerance": 1,
                "expected": {"NDCG@20": 0.5}, "minutes": 1},
        "runs": {"co-occurrence": {"data": "season"}, "the same, shuffled": {"data": "shuffled"}},
        "tests": {"features": [["co-occurrence", "the same, shuffled"]]},
    }  # fmt: skip
    Path("season.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    main(["season.yaml", "--output_dir", "out"])
    assert reproduce.ran == ["sample", "process", "sample", "process", "baseline", "baseline"]
    kinds = ("season", "shuffled_season")
    texts = [Path(f"out/raw/{kind}_0/season.csv").read_text() for kind in kinds]
    assert texts[0] != texts[1]
    # Sessions are the same, and a model that reads no features finds the same.
    (test,) = read_json("out/reproduction.json")["tests"]
    assert test["rows"][0]["difference"] == 0
    text = Path("out/reproduction.md").read_text()
    assert "95 % bootstrap intervals over sessions;" in text
    assert re.search(r"\| \|known target \([\d,]+ targets\)\|new target \([\d,]+ targets\)\|", text)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_of_the_package_has_flags_that_exist(path, capsys):
    from baselines.arguments import BaselineArguments
    from recformer.commands import process
    from recformer.finetune import FinetuneArguments

    with pytest.raises(SystemExit):
        process.main(["--help"])
    flags_of_process = set(re.findall(r"--(\w+)", capsys.readouterr().out))

    experiment = Experiment.load(path.stem)
    for run in experiment.runs:
        known = FinetuneArguments if run.command == "finetune" else BaselineArguments
        assert set(run.flags) <= set(known.__dataclass_fields__), run.name
    for data in experiment.data.values():
        assert set(data.process) <= flags_of_process, data.name
        assert data.split_hash
        assert data.sample is not None or data.origin
        raw = {data.process[name] for name in DATA_FILES if name in data.process}
        assert data.sample is not None or set(data.sha256) == raw
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in data.sha256.values())
    for step in experiment.steps.values():
        for command, *words in step.commands:
            module = import_module(next(g[command][0] for g in COMMANDS.values() if command in g))
            with pytest.raises(SystemExit):
                module.main(["--help"])
            flags = set(re.findall(r"--(\w+)", capsys.readouterr().out))
            assert {word[2:] for word in words if word.startswith("--")} <= flags, step.name
    with pytest.raises(FileNotFoundError, match="no such experiment; there are .*sample"):
        Experiment.load("none")
