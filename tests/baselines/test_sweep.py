"""`recformer sweep`: what is searched, what is kept, and that it goes on."""

from __future__ import annotations

import csv
import errno
import fcntl
import os
import re
import shlex
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]

pytest.importorskip("optuna_integration")

from optuna.exceptions import StorageInternalError

from baselines import sweep
from baselines.__main__ import main as baseline
from baselines.command_lines import checked
from baselines.sweep import folder_of, main
from baselines.sweep_file import Sweep
from recformer.data.processed import Sequences, write_processed
from recformer.files import UserError, read_json
from recformer.training import run_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a sweep of two settings."""
    train = [[user % 4, (user + 1) % 4, (user + 2) % 4] for user in range(8)]
    write_processed(
        tmp_path / "folder",
        train=Sequences.from_lists(train),
        val=Sequences.from_lists([[(user + 3) % 4] for user in range(8)]),
        test=Sequences.from_lists([[(user + 4) % 4] for user in range(8)]),
        user_names=[f"u{user}" for user in range(8)],
        asins=["A", "B", "C", "D"],
        meta={},
        dataset={},
    )
    content = {
        "command": "baseline",
        "flags": {"model": "sasrec", "data_path": "folder", "num_train_epochs": 3, "device": -1,
                  "num_heads": 1, "num_layers": 1, "metric_ks": [10]},
        "search": {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
                   "hidden_size": [4, 8]},
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trials() -> list[dict[str, str]]:
    with Path("out/trials.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_a_search_by_validation_that_goes_on(place, capsys, monkeypatch):
    main(["sweep.yaml", "--output_dir", "out", "--trials", "2"])
    first = trials()
    assert [row["state"] for row in first] == ["complete", "complete"]
    for row in first:
        settings = {"learning_rate": float(row["learning_rate"]),
                    "hidden_size": int(row["hidden_size"])}  # fmt: skip
        folder = folder_of(Path("out"), settings)
        assert folder.name == row["folder"]
        result = read_json(folder / "metrics.json")
        best = max(r["val/NDCG@10"] for r in result["stages"]["training"]["rows"])
        assert float(row["validation"]) == pytest.approx(best)
    # Killed in the third trial: it is tried again in the same folder, and the others are kept.
    whole = sweep.objective

    def cut_off(*arguments):
        folder_of(Path("out"), sweep.suggested(arguments[2], arguments[0].search)).mkdir(
            exist_ok=True
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "objective", cut_off)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main(["sweep.yaml", "--output_dir", "out", "--trials", "3"])
    monkeypatch.setattr(sweep, "objective", whole)
    begun = {path.name for path in Path("out").glob("trial_*")}
    assert len(begun) == 3
    capsys.readouterr()
    main(["sweep.yaml", "--output_dir", "out", "--trials", "3"])
    rows = trials()
    assert rows[:2] == first
    assert [row["state"] for row in rows[2:]] == ["complete"]
    assert "3 trials: 3 complete\n" in Path("out/sweep.md").read_text()
    assert "trial & validation & " in Path("out/sweep.tex").read_text()
    assert {path.name for path in Path("out").glob("trial_*")} == begun
    said = capsys.readouterr().out
    best = max((row for row in rows if row["validation"]), key=lambda r: float(r["validation"]))
    assert f"--learning_rate {best['learning_rate']}" in said
    assert Path("out/importance.png").read_bytes().startswith(b"\x89PNG")
    # Done: nothing is run again. Another search is refused there.
    monkeypatch.setattr(sweep, "objective", None)
    main(["sweep.yaml", "--output_dir", "out", "--trials", "3"])
    said = r"another run \(different: seed\); choose another --output_dir, or remove out to search"
    with pytest.raises(UserError, match=said):
        main(["sweep.yaml", "--output_dir", "out", "--trials", "3", "--seed", "1"])
    # The folder of the best is gone: what to type is said, and works.
    shutil.rmtree(Path("out") / best["folder"])
    monkeypatch.setattr(sweep, "objective", whole)
    with pytest.raises(UserError, match=rf"{best['folder']} of the best trial has no metrics") as e:
        main(["sweep.yaml", "--output_dir", "out", "--trials", "3"])
    words = shlex.split(str(e.value).split("`")[1])
    assert words[:2] == ["recformer", "baseline"]
    baseline(words[2:])
    main(["sweep.yaml", "--output_dir", "out", "--trials", "3"])
    assert trials() == rows


def search_of(**search: object) -> None:
    content = yaml.safe_load(Path("sweep.yaml").read_text())
    flags = {name: value for name, value in content["flags"].items() if name not in search}
    Path("sweep.yaml").write_text(yaml.safe_dump(content | {"flags": flags, "search": search}))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Settings of the trials, which are only counted: the larger their sum the better."""
    settings: list[dict] = []

    def quick(sweep_, output_dir, trial):
        settings.append(sweep.suggested(trial, sweep_.search))
        folder = folder_of(output_dir, settings[-1])
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").touch()
        trial.set_user_attr("folder", folder.name)
        return float(sum(settings[-1].values()))

    test = type("Result", (), {"test": {"NDCG@10": 0.5}, "load": classmethod(lambda cls, _: cls)})
    monkeypatch.setattr(sweep, "RunResult", test)
    monkeypatch.setattr(sweep, "objective", quick)
    return settings


def test_a_trial_that_fails_is_noted_and_the_others_go_on(place, capsys):
    search_of(learning_rate=[1e30, 1e-3])
    command = ["sweep.yaml", "--output_dir", "out", "--trials", "6"]
    main(command)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    states = {float(row["learning_rate"]): row["state"] for row in trials()}
    assert states == {1e30: "failed", 1e-3: "complete"}
    (failed,) = [row for row in trials() if row["state"] == "failed"]
    assert failed["error"].startswith("the user vector in row 0 holds NaN")
    assert (
        "2 trials: 1 complete, 1 failed; the search has no other settings, so it ends before "
        "--trials 6; trials.csv has the errors, a failed one is tried again without its folder\n"
    ) in out
    # Nothing is tried again, but for the failed one once its folder is removed.
    begun = Path("out") / failed["folder"] / "run.json"
    before = begun.stat().st_mtime_ns
    main(command)
    assert begun.stat().st_mtime_ns == before
    shutil.rmtree(begun.parent)
    main(command)
    assert begun.exists()
    again = {row["folder"]: row for row in trials()}[failed["folder"]]
    assert (again["state"], again["error"]) == ("failed", failed["error"])
    assert int(again["trial"]) > int(failed["trial"])


@pytest.mark.parametrize("memory", [False, True])
def test_a_search_of_which_nothing_comes_to_its_end_says_so(place, monkeypatch, memory):
    def fails(*arguments):
        trial, settings = arguments[2], sweep.suggested(arguments[2], arguments[0].search)
        trial.set_user_attr("folder", folder_of(arguments[1], settings).name)
        (arguments[1] / trial.user_attrs["folder"]).mkdir()
        if memory:
            torch.empty(2**60)  # as a table of too many numbers
        raise UserError(f"no size {settings['hidden_size']}\nmore")

    monkeypatch.setattr(sweep, "objective", fails)
    search_of(hidden_size=[4, 8])
    error = ".*can't allocate memory: .*" if memory else "no size [48]"
    said = rf"no trial came to its end \(2 trials: 2 failed; .*; the last error: {error}$"
    with pytest.raises(UserError, match=said):
        main(["sweep.yaml", "--output_dir", "out", "--trials", "2"])
    assert [row["state"] for row in trials()] == ["failed", "failed"]


def test_what_is_no_fault_of_the_settings_ends_the_sweep_and_is_tried_again(place, monkeypatch):
    search_of(hidden_size=[4, 8])
    command = ["sweep.yaml", "--output_dir", "out", "--trials", "1"]
    whole = sweep.objective

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "out/x")

    monkeypatch.setattr(sweep, "objective", full)
    with pytest.raises(OSError, match="No space"):
        main(command)
    # A trial's folder that is of another run: the words are those of a sweep.
    monkeypatch.setattr(sweep, "objective", whole)
    for size in (4, 8):
        folder = folder_of(Path("out"), {"hidden_size": size})
        folder.mkdir()
        (folder / "run.json").write_text('{"seed": 7}')
    with pytest.raises(UserError) as refused:
        main(command)
    assert "; remove out/trial_" in str(refused.value)
    assert "overwrite" not in str(refused.value)
    shutil.rmtree(re.search(r"remove (out/trial_\w+),", str(refused.value))[1])
    main(command)
    assert [row["state"] for row in trials()] == ["complete"]


def test_the_same_settings_are_not_tried_twice(place, tried, capsys):
    search_of(hidden_size=[8, 16, 8], num_layers={"low": 1, "high": 2})
    main(["sweep.yaml", "--output_dir", "out", "--trials", "3"])
    assert len(tried) == 3
    assert "other settings" not in capsys.readouterr().out
    main(["sweep.yaml", "--output_dir", "out", "--trials", "9"])
    all_there_are = {(8, 1), (8, 2), (16, 1), (16, 2)}
    assert len(tried) == 4
    assert {(t["hidden_size"], t["num_layers"]) for t in tried} == all_there_are
    rows = trials()
    assert {(int(r["hidden_size"]), int(r["num_layers"])) for r in rows} == all_there_are
    assert [row["state"] for row in rows] == ["complete"] * 4
    said = capsys.readouterr().out
    assert "4 trials: 4 complete; the search has no other settings, so it ends before" in said
    assert said.count("|18.0000|") == 1


def test_a_damaged_study_is_refused_in_a_line(place, tried):
    command = ["sweep.yaml", "--output_dir", "out", "--trials", "2"]
    main(command)
    path, page = Path("out/study.db"), 4096
    content, first = path.read_bytes(), trials()
    half = len(content) // 2 // page * page
    for damaged in (b"garbage" * 1000, content[:half], content[: half + 100], b""):
        path.write_bytes(damaged)
        for _ in range(2):  # looking at it does not make it whole
            with pytest.raises(UserError, match=r"study.db is damaged \(.*remove it, and") as said:
                main(command)
            assert "\n" not in str(said.value)
    path.write_bytes(content)
    main(command)
    assert len(tried) == 2
    path.unlink()
    main(command)
    assert trials() == first


def test_errors_of_the_study_are_a_line(tmp_path):
    path = tmp_path / "study.db"
    said = "study.db: database or disk is full; once that is mended the same command goes on"
    with pytest.raises(UserError, match=said), sweep.errors_of_storage(path):
        raise StorageInternalError("long words") from sqlite3.OperationalError(
            "database or disk is full"
        )
    with pytest.raises(UserError, match="a trial's own"), sweep.errors_of_storage(path):
        raise UserError("a trial's own")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("command: baseline", "command: pretrain", "expected baseline or finetune"),
        ("low: 0.0001", "low: 1.0", "low below high"),
        ("low: 0.0001", "low: 0.0", "above 0 with log"),
        ("num_layers: 1", "hidden_size: 1", r"\['hidden_size'\] is fixed and searched"),
        ("num_layers: 1", "output_dir: x", "output_dir is the sweep's own"),
        ("num_layers: 1", "nun_layers: 1", "is it --num_layers"),
        ("- 8\n", "- 8\n  - 0\n", "--hidden_size 0"),  # the last value
        ("high: 0.1", "high: .inf", "low below high"),
        ("num_layers: 1", "num_layers: {a: 1}", "num_layers is {'a': 1}, expected a value"),
        ("num_layers: 1", "num_processes: 2", "a trial runs in one process"),
        ("num_layers: 1", "num_layers: 1\n  num_layers: 2", "'num_layers' stands twice"),
        ("search:", "searches:", "expected command, flags and search"),
        ("command:", "command: [", "is no YAML"),
        ("search:", "metric: Recall@10\nsearch:", "yaml: metric means nothing there, expected "
         "command, flags and search"),
        ("search:", "trails: 3\nflagz: {}\n7: 8\nsearch:", "sweep.yaml: trails, flagz, 7 means"),
        ("log: true", "log: true\n    step: 2", "sweep.yaml, search of learning_rate: step means "
         "nothing there, expected low, high and log"),
        ("log: true", "lag: true", "search of learning_rate: lag means nothing"),
    ],
)  # fmt: skip
def test_files_of_another_form_are_refused(place, old, new, said):
    Path("sweep.yaml").write_text(Path("sweep.yaml").read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        main(["sweep.yaml", "--output_dir", "out"])
    assert not Path("out").exists()


def test_a_search_that_was_cut_off_tries_what_it_would_have_tried(place, tried, monkeypatch):
    def tries(flags):
        main(["sweep.yaml", *flags])
        return [(row["learning_rate"], row["hidden_size"]) for row in trials()]

    whole_objective = sweep.objective

    def quick(sweep_, output_dir, trial):
        value = whole_objective(sweep_, output_dir, trial)
        if trial.number == cut:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr(sweep, "objective", quick)
    cut, flags = -1, ["--output_dir", "out", "--trials", "14", "--seed", "3"]
    whole = tries(flags)
    Path("out").rename("whole")
    cut = 12  # past the ten trials that are drawn without regard to the others
    with pytest.raises(KeyboardInterrupt):
        main(["sweep.yaml", *flags])
    assert tries(flags) == whole
    assert len(set(whole)) == 14


def test_a_folder_of_any_name_holds_its_data_and_its_process(place, monkeypatch):
    output = Path("a?b=c {x} %d")
    main(["sweep.yaml", "--output_dir", str(output), "--trials", "1"])
    assert (output / "study.db").stat().st_size > 0
    held = os.open(output, os.O_RDONLY)
    released = run_folder._held.pop(os.path.realpath(output))
    os.close(released)
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)
    with pytest.raises(UserError, match="at work in"):
        main(["sweep.yaml", "--output_dir", str(output), "--trials", "1"])
    os.close(held)
    # Figures of other data do not stand beside those of these.
    write_processed(
        "folder",
        train=Sequences.from_lists([[0, 1, 2]] * 8),
        val=Sequences.from_lists([[1]] * 8),
        test=Sequences.from_lists([[0]] * 8),
        user_names=[f"u{user}" for user in range(8)],
        asins=["A", "B", "C", "D"],
        meta={},
        dataset={},
    )
    with pytest.raises(UserError, match=r"holds another run \(different: split_hash\)"):
        main(["sweep.yaml", "--output_dir", str(output), "--trials", "1"])


def test_it_searches_finetuning_too():
    example = Sweep("finetune", {"data_path": "x", "method": "head"}, {"bag_size": [8, 16]})
    args, run = checked("finetune", example.words({"bag_size": 16}, Path("out")))
    assert (args.method, args.bag_size, args.learning_rate) == ("head", 16, 1e-3)
    assert run.__module__ == "recformer.finetune"
