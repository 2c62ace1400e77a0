"""`recformer sweep`: what is searched, what is kept, and that it goes on."""

from __future__ import annotations

import csv
import fcntl
import os
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("optuna_integration")

from baselines import sweep
from baselines.command_lines import checked
from baselines.sweep import Sweep, folder_of, main
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
    assert [row["state"] for row in rows[2:]] == ["fail", "fail", "complete"]
    assert {path.name for path in Path("out").glob("trial_*")} == begun
    said = capsys.readouterr().out
    best = max((row for row in rows if row["validation"]), key=lambda r: float(r["validation"]))
    assert f"--learning_rate {best['learning_rate']}" in said
    assert Path("out/importance.png").read_bytes().startswith(b"\x89PNG")
    # Done: nothing is run again. Another search is refused there.
    monkeypatch.setattr(sweep, "objective", None)
    main(["sweep.yaml", "--output_dir", "out", "--trials", "3"])
    with pytest.raises(UserError, match="holds another run .different: seed"):
        main(["sweep.yaml", "--output_dir", "out", "--trials", "3", "--seed", "1"])


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
    ],
)
def test_files_of_another_form_are_refused(place, old, new, said):
    Path("sweep.yaml").write_text(Path("sweep.yaml").read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        main(["sweep.yaml", "--output_dir", "out"])
    assert not Path("out").exists()


def test_a_search_that_was_cut_off_tries_what_it_would_have_tried(place, monkeypatch):
    def tried(flags):
        main(["sweep.yaml", *flags])
        return [(row["learning_rate"], row["hidden_size"]) for row in trials()
                if row["state"] != "fail"]  # fmt: skip

    def quick(sweep_, output_dir, trial):
        settings = sweep.suggested(trial, sweep_.search)
        trial.set_user_attr("folder", folder_of(output_dir, settings).name)
        if trial.number == cut:
            raise KeyboardInterrupt
        return settings["hidden_size"] + settings["learning_rate"]

    test = type("Result", (), {"test": {"NDCG@10": 0.5}, "load": classmethod(lambda cls, _: cls)})
    monkeypatch.setattr(sweep, "RunResult", test)
    monkeypatch.setattr(sweep, "objective", quick)
    cut, flags = -1, ["--output_dir", "out", "--trials", "14", "--seed", "3"]
    whole = tried(flags)
    Path("out").rename("whole")
    cut = 12  # past the ten trials that are drawn without regard to the others
    with pytest.raises(KeyboardInterrupt):
        main(["sweep.yaml", *flags])
    assert tried(flags) == whole
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
