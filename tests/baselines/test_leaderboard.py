"""The leaderboard: what it collects, what it never mixes, what it runs."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baselines import leaderboard
from baselines.arguments import BaselineRunArguments
from baselines.command_lines import checked, defaults_of
from baselines.leaderboard import flags_without_training, main, markdown
from baselines.rows import find_runs, row_of, tables
from baselines.settings import SETTINGS
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.runs import RankedRun
from recformer.files import UserError, read_json, write_json


def write_run(
    folder: Path,
    above: list[int],
    evaluations: tuple[str, ...] = ("trained",),
    slices: dict | None = None,
    **rule,
) -> None:
    evaluator = Evaluator((10, 50))
    count = len(above)
    ranks = TargetRanks(np.array(above), np.zeros(count, int), np.full(count, 100))
    evaluator.update(torch.arange(count), torch.arange(count), ranks)
    if slices is None:
        slices = {"cold target": {"num_users": 2, "NDCG@10": 0.25}}
    figures = {name: {"test": {"slices": {}}} for name in evaluations}
    figures[evaluations[-1]] = {"test": {"slices": slices}}
    metrics = {
        "split_hash": "abc",
        "ties": "expected",
        "filter_seen": False,
        "evaluations": figures,
        "stages": {
            "training": {
                "best": 0.5,
                "rows": [{"seconds": 40.0}, {"seconds": 50.0}],
                "seconds": 90.0,
            }
        },
        "parameters": 1234,
        "seconds_a_user": 0.002,
    }
    for name in evaluations:
        evaluator.write_parquet(folder / "ranks" / f"{name}_test.parquet")
    (folder / "metrics.json").write_text(json.dumps(metrics | rule))


def test_a_table_by_hand(tmp_path, capsys):
    write_run(tmp_path / "good", [0] * 8)
    write_run(tmp_path / "bad", [0, 1] + [90] * 6)
    write_run(tmp_path / "ours", [0, 1, 0, 1, 0, 1, 0, 1], ("zero_shot", "stage1"))
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert (tmp_path / "leaderboard.md").read_text() in printed
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    (rows,) = read_json(tmp_path / "leaderboard.json")
    assert [row["name"] for row in rows] == ["good", "ours", "ours, zero-shot", "bad"]
    second = 1 / np.log2(3)
    assert rows[0]["figures"]["NDCG@10"] == [1, 1, 1]
    assert rows[1]["figures"]["NDCG@10"][0] == pytest.approx((4 + 4 * second) / 8)
    assert rows[3]["figures"]["Recall@10"][0] == 2 / 8
    assert rows[3]["figures"]["MRR"][0] == pytest.approx((1 + 1 / 2 + 6 / 91) / 8)
    assert rows[0]["p"] is None
    # Seven users differ, all in one direction: 2 of 2**7 sign flips are as extreme; the least of
    # three p-values is multiplied by three, and no later one is below it.
    assert rows[3]["p"] == pytest.approx(3 * 2 / 128, abs=0.01)
    # Four users differ: 2 of 16, times three or less, and the smaller is not below the larger.
    assert rows[1]["p"] == rows[2]["p"] == pytest.approx(2 * 2 / 16, abs=0.03)
    assert rows[0]["train_seconds"] == 90
    assert rows[2]["train_seconds"] == rows[2]["parameters"] == 0
    assert "|good|1.0000 [1.0000, 1.0000]|" in printed
    assert "|1,234|1.5 min|2.0|" in printed
    assert "|cold target (2)|" in printed
    assert "|good|0.2500|" in printed


@pytest.mark.parametrize(
    "rule", [{"split_hash": "other"}, {"ties": "pessimistic"}, {"filter_seen": True}]
)
def test_runs_by_other_rules_never_share_a_table(tmp_path, rule):
    write_run(tmp_path / "one", [0, 1])
    write_run(tmp_path / "two", [1, 1])
    write_run(tmp_path / "three", [0, 0], **rule)
    groups = tables([row_of(*run) for run in find_runs(tmp_path)])
    assert [[row.run.name for row in group] for group in groups] == [["one", "two"], ["three"]]
    assert "three" not in markdown(groups[0])


def test_runs_of_other_users_never_share_a_table(tmp_path):
    write_run(tmp_path / "one", [0, 1])
    write_run(tmp_path / "two", [1, 1, 1])
    assert len(tables([row_of(*run) for run in find_runs(tmp_path)])) == 2


def test_names_of_folders_and_cut_offs_of_runs_are_free(tmp_path):
    folder = tmp_path / "a=b:c"
    slices = {"cold target": {"num_users": 2, "NDCG@5": 0.25}}
    write_run(folder / "lr=0.1:x", [0, 1], slices=slices)
    (row,) = [row_of(*run) for run in find_runs(folder)]
    assert row.run.name == "lr=0.1:x"
    assert row.slices == {}


def test_slices_of_runs_without_any_come_from_the_data(tmp_path):
    path = tmp_path / "folder"
    write_processed(
        path,
        train=Sequences.from_lists([[1, 1], [0, 2, 3, 4, 4, 4, 1]]),
        val=Sequences.from_lists([[1], [1]]),
        test=Sequences.from_lists([[0], [1]]),
        user_names=["a", "b"],
        asins=[f"A{i}" for i in range(100)],
        meta={},
        dataset={},
    )
    folder = ProcessedFolder.load(path)
    write_run(tmp_path / "run", [0, 1], slices={}, split_hash=folder.split_hash)
    (place,) = find_runs(tmp_path)
    assert row_of(*place).slices == {}
    found = row_of(*place, folder).slices
    assert found["first-time target"] == [1, 1.0]
    assert found["repeat target"] == [1, pytest.approx(1 / np.log2(3))]


def test_what_is_missing_is_run_and_what_is_there_is_not(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "popularity", [0, 1])
    commands = []

    def pretend(command):
        commands.append(command[3:])
        write_run(Path(command[command.index("--output_dir") + 1]), [1, 0])
        return 0

    monkeypatch.setattr(leaderboard, "run_command", pretend)
    data = SimpleNamespace(path=Path("D"), split_hash="abc")
    monkeypatch.setattr(leaderboard.ProcessedFolder, "load", lambda path: data)
    models = ["popularity", "cooccurrence", "sasrec", "baselines/configs/t4r.yaml"]
    flags = ["--dropout", "0.1", "--metric_ks", "1", "10", "--filter_seen"]
    main([str(tmp_path), "--data_path", "D", *flags, "--models", *models])
    output = str(tmp_path)
    assert commands == [
        ["--model", "cooccurrence", "--data_path", "D", "--output_dir", f"{output}/cooccurrence",
         *flags[2:]],  # which nothing that trains is part of, but all that puts it in a table
        ["--model", "sasrec", "--data_path", "D", "--output_dir", f"{output}/sasrec", *flags],
        ["--config", models[3], "--data_path", "D", "--output_dir", f"{output}/t4r", *flags],
    ]  # fmt: skip
    assert "|t4r|" in capsys.readouterr().out
    data.split_hash = "other"
    with pytest.raises(UserError, match="sasrec is a run on other data than D"):
        main([str(tmp_path), "--data_path", "D", "--models", "sasrec"])
    with pytest.raises(UserError, match="two are called t4r"):
        main([str(tmp_path), "--data_path", "D", "--models", "t4r", models[3]])


def test_a_finished_run_of_other_flags_is_not_taken_for_the_one_asked_for(tmp_path, monkeypatch):
    write_run(tmp_path / "sasrec", [0, 1])
    settings = {"num_train_epochs": 200, "hidden_size": 8, "num_heads": 1, "seed": 42}
    write_json(tmp_path / "sasrec" / "run.json", settings)
    monkeypatch.setattr(leaderboard, "run_command", lambda command: pytest.fail("trained"))
    data = SimpleNamespace(path=Path("D"), split_hash="abc")
    monkeypatch.setattr(leaderboard.ProcessedFolder, "load", lambda path: data)
    line = [str(tmp_path), "--data_path", "D", "--models", "sasrec", "--num_heads", "1"]
    main([*line, "--hidden_size", "8"])
    with pytest.raises(UserError, match=r"different: hidden_size, num_train_epochs"):
        main([*line, "--hidden_size", "16", "--num_train_epochs", "3"])
    with pytest.raises(UserError, match=r"different: history_term\)"):  # which the run lacks
        main([*line, "--hidden_size", "8", "--history_term"])
    # A flag that the last model lacks is said before the first one is trained.
    line = [str(tmp_path), "--data_path", "D", "--models", "gru4rec", "cooccurrence"]
    with pytest.raises(UserError, match="--num_heads is no flag of --model gru4rec"):
        main([*line, "--num_heads", "2"])


def test_flags_without_training():
    flags = ["--decay", "0", "--num_beams=3", "--device", "-1", "--arch", "bert", "--seed", "1"]
    assert flags_without_training("popularity", ["--seeds", "1", "2", "--fp16"]) == ["--fp16"]
    assert flags_without_training("popularity", flags) == ["--device", "-1", "--seed", "1"]
    assert flags_without_training("cooccurrence", flags) == [
        "--decay", "0", "--device", "-1", "--seed", "1"
    ]  # fmt: skip
    training = {
        "num_train_epochs", "batch_size", "gradient_accumulation_steps", "learning_rate",
        "weight_decay", "warmup_steps", "max_grad_norm", "verbose", "schedule", "optimizer",
        "patience", "windows", "evaluate_only",
    }  # fmt: skip
    own = {field.name for field in fields(BaselineRunArguments)} - {"model", "seeds"}
    words = [word for name in sorted(own) for word in (f"--{name}", "1")]
    kept = [word for name in sorted(own - training) for word in (f"--{name}", "1")]
    assert flags_without_training("vsknn", words) == kept
    # As the parser takes them, too: with hyphens, cut short.
    spelled = ["--num-train-epochs", "2", "--batch-s=4", "--neigh", "3", "--metric-ks", "5"]
    assert flags_without_training("vsknn", spelled) == spelled[3:]


def test_untrained_runs_of_other_flags_of_training_are_the_same_runs(tmp_path, monkeypatch):
    data = SimpleNamespace(path=Path("D"), split_hash="abc")
    monkeypatch.setattr(leaderboard.ProcessedFolder, "load", lambda path: data)
    monkeypatch.setattr(leaderboard, "run_command", lambda command: pytest.fail("run again"))
    # As they were noted before flags of training were kept from untrained models.
    config = tmp_path / "mine.yaml"
    config.write_text("model: cooccurrence\ndecay: 0.5\n")
    for name, decay in (("cooccurrence", 0.6), ("mine", 0.5)):
        write_run(tmp_path / name, [0, 1])
        settings = {"model": "cooccurrence", "num_train_epochs": 2, "decay": decay}
        settings["metric_ks"] = [10, 50]
        write_json(tmp_path / name / "run.json", settings)
    line = [str(tmp_path), "--data_path", "D", "--models", "cooccurrence", str(config)]
    main(line)
    main([*line, "--num_train_epochs", "3", "--batch-size", "8", "--hidden_size", "16"])
    with pytest.raises(UserError, match=r"cooccurrence is a finished .*different: metric_ks\)"):
        main([*line, "--metric_ks", "5"])


def test_a_run_that_fails_leaves_the_others_and_their_table(tmp_path, monkeypatch, capsys):
    def pretend(command):
        fails = "sasrec" in command
        if not fails:
            write_run(Path(command[command.index("--output_dir") + 1]), [1, 0])
        return -9 if fails else 0

    monkeypatch.setattr(leaderboard, "run_command", pretend)
    data = SimpleNamespace(path=Path("D"), split_hash="abc")
    monkeypatch.setattr(leaderboard.ProcessedFolder, "load", lambda path: data)
    arguments = [str(tmp_path), "--data_path", "D", "--models", "sasrec"]
    with pytest.raises(UserError, match="^sasrec failed"):  # and there is no other
        main(arguments)
    with pytest.raises(UserError, match="^sasrec failed"):
        main([*arguments, "popularity"])
    assert "|popularity|" in (tmp_path / "leaderboard.md").read_text()
    assert "sasrec failed: " in capsys.readouterr().err


def test_flags_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds a metrics.json"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="no folder in .*gone holds a metrics.json"):
        main([str(tmp_path / "gone")])
    with pytest.raises(UserError, match="--models needs --data_path"):
        main([str(tmp_path), "--models", "sasrec"])
    with pytest.raises(UserError, match="--loss: flags of models need --models"):
        main([str(tmp_path), "--loss", "bce"])
    line = [str(tmp_path), "--data_path", "x", "--models", "sasrec", "--output_dir", "one"]
    with pytest.raises(UserError, match="--output_dir: each model has a folder of its own in"):
        main(line)
    with pytest.raises(UserError, match="--output-dir=one: each model has a folder of its own in"):
        main([*line[:-2], "--output-dir=one"])


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path, capsys):
    runs = {
        "good": [0] * 8,
        "head_s1": [0, 1] * 4,
        "head_s2": [1, 0] * 4,
        "head_s3": [0] * 7 + [90],
    }
    for seed, (name, above) in enumerate(runs.items()):
        write_run(tmp_path / name, above, ("zero_shot", "stage1"), seed=seed)
        settings = {"model": name[:4], "seed": seed, "weights": f"drawn {seed}", "lr": 0.1}
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    # Of another setting, of the same seed again, and of one that says nothing of its settings.
    other = {"model": "head", "seed": 4, "lr": 0.2}
    for name, settings in (("other", other), ("head_t", other | {"seed": 3, "lr": 0.1})):
        write_run(tmp_path / name, [90] * 8, seed=settings["seed"])
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    write_run(tmp_path / "silent", [91] * 8)
    write_run(tmp_path / "many" / "seed_7", [80] * 8, seed=7)
    main([str(tmp_path)])
    (rows,) = read_json(tmp_path / "leaderboard.json")
    assert {row["name"]: row["seeds"] for row in rows} == {
        "good": [0], "good, zero-shot": [0], "head (3 seeds)": [1, 2, 3], "other": [4],
        "head, zero-shot (3 seeds)": [1, 2, 3], "head_t": [3], "silent": [], "many/seed_7": [7],
    }  # fmt: skip
    (head,) = [row for row in rows if row["name"] == "head (3 seeds)"]
    second = 1 / np.log2(3)
    values = [(1 + second) / 2, (1 + second) / 2, 7 / 8]
    assert head["figures"]["NDCG@10"][0] == pytest.approx(np.mean(values))
    assert head["deviation"]["NDCG@10"] == pytest.approx(np.std(values, ddof=1))
    # Each user's mean over seeds is what is drawn anew and tested: all eight are below `good`.
    assert head["p"] >= 2 / 2**8
    assert f"|head (3 seeds)|{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} [" in (
        capsys.readouterr().out
    )
    with (tmp_path / "leaderboard.csv").open() as handle:
        lines = {line["name"]: line for line in csv.DictReader(handle)}
    assert float(lines["head (3 seeds)"]["NDCG@10"]) == pytest.approx(np.mean(values))
    assert lines["head (3 seeds)"]["seeds"] == "1 2 3"
    latex = (tmp_path / "leaderboard.tex").read_text()
    assert r"head (3 seeds) & " in latex
    assert r" $\pm$ " in latex
    assert r"many/seed\_7 & " in latex


def test_runs_are_found_at_any_depth_and_once(tmp_path, capsys):
    def names(folder: Path) -> list[str]:
        return [name for _, _, name in find_runs(folder)]

    shop = tmp_path / "runs" / "shop"
    for seed in (1, 2):  # as `recformer reproduce` lays them
        write_run(shop / "sasrec" / f"seed_{seed}", [0, seed], seed=seed)
        (shop / "sasrec" / f"seed_{seed}" / "run.json").write_text(json.dumps({"seed": seed}))
    write_run(shop / "popularity", [1, 1], parameters=0)
    (shop / "popularity" / "run.json").write_text("{}")
    # What a run keeps for itself is no run beside it, of a finished one and of one under way.
    for run in (shop / "popularity", shop / "under_way"):
        write_run(run / "windows" / "window_1", [0, 0])
        (run / "windows" / "window_1" / "run.json").write_text("{}")
        write_run(run / "training" / "last.ckpt" / "old", [0, 0])
        (run / "run.json").write_text("{}")
    write_run(tmp_path / ".trash" / "gone", [0, 0])
    (shop / "again").symlink_to(tmp_path)
    every = ["popularity", "sasrec/seed_1", "sasrec/seed_2"]
    assert names(tmp_path) == [f"runs/shop/{name}" for name in every]
    assert names(shop) == every
    assert names(shop / "popularity") == ["popularity"]
    assert names(shop / "sasrec") == ["seed_1", "seed_2"]
    main([str(tmp_path)])
    (rows,) = read_json(tmp_path / "leaderboard.json")
    assert {row["name"]: row["seeds"] for row in rows} == {
        "runs/shop/sasrec (2 seeds)": [1, 2], "runs/shop/popularity": [],
    }  # fmt: skip
    main([str(shop / "sasrec" / "seed_1")])
    assert "|seed_1|" in capsys.readouterr().out
    # Runs within a run's folder: of the default --output_dir's of two commands, and of a sweep.
    write_run(shop / "popularity" / "sasrec", [0, 0])
    write_run(shop / "under_way" / "trial_1", [0, 0])
    write_run(shop / "under_way" / "gru4rec" / "seed_3", [0, 0])
    assert names(shop)[:2] == ["popularity", "popularity/sasrec"]
    assert names(shop)[-2:] == ["under_way/gru4rec/seed_3", "under_way/trial_1"]


def test_a_flag_that_an_older_run_lacks_counts_as_its_default(tmp_path):
    settings = {"model": "sasrec", "hidden_size": 8}
    runs: dict[str, dict] = {
        "old_s1": {},
        "term_s2": {"history_term": True},
        "new_s3": {"history_term": False, "num_nodes": 1},  # defaults
        "nodes_s4": {"num_nodes": 2},
        "inverse_s5": {"schedule": "inverse_sqrt"},
        "unknown_s6": {"split_items": "of a later version"},
    }
    for seed, (name, own) in enumerate(runs.items(), 1):
        write_run(tmp_path / name, [0, 1], seed=seed)
        (tmp_path / name / "run.json").write_text(json.dumps(settings | {"seed": seed} | own))
    # The settings say nothing of it, but these weights are others.
    write_run(tmp_path / "larger_s7", [0, 1], seed=7, parameters=1236)
    (tmp_path / "larger_s7" / "run.json").write_text(json.dumps(settings | {"seed": 7}))
    main([str(tmp_path)])
    (rows,) = read_json(tmp_path / "leaderboard.json")
    assert sorted(row["seeds"] for row in rows) == [[1, 3, 6], [2], [4], [5], [7]]


def test_defaults_of_older_runs():
    tiger, sasrec = (defaults_of({"model": name}) for name in ("tiger", "sasrec"))
    assert (tiger["optimizer"], tiger["user_tokens"]) == ("adamw", 0)  # before there were flags
    assert (sasrec["optimizer"], sasrec["user_tokens"]) == ("adamw", None)
    assert all(defaults_of({"model": name}) for name in SETTINGS)
    assert defaults_of({"model": "cooccurrence"})["decay"] == 0.6
    assert defaults_of({"pretrain_ckpt": None, "method": "head"})["learning_rate"] == 1e-3
    assert defaults_of({"pretrain_ckpt": None})["learning_rate"] == 5e-5
    assert defaults_of({"model": "gone"}) == defaults_of({}) == {}


def test_names_with_the_signs_of_tables_and_formulas(tmp_path, capsys):
    for name in ("a|b", "c:d", "lr=$1$", "e:zero_shot"):
        write_run(tmp_path / name, [0] * 8)
    main([str(tmp_path)])
    assert "|a\\|b|1.0000 [" in capsys.readouterr().out
    (rows,) = read_json(tmp_path / "leaderboard.json")
    assert [row["name"] for row in rows] == ["a|b", "c:d", "e:zero_shot", "lr=$1$"]
    for text, name in (
        ("c:d", "c:d"), ("c:d:trained", "c:d:trained"), ("x=c:d", "x"), ("lr=$1$", "lr=$1$"),
        ("lr=$1$:trained", "lr=$1$:trained"), ("y=lr=$1$:trained", "y"), ("e:zero_shot",) * 2,
    ):  # fmt: skip
        given, _, place = text.partition("=") if text[1] == "=" else ("", "", text)
        run = RankedRun.load(f"{given}={tmp_path / place}" if given else str(tmp_path / place))
        assert run.name == name
    with pytest.raises(FileNotFoundError, match="gone is no run: expected"):
        RankedRun.load(str(tmp_path / "gone"))


def test_an_untrained_run_that_was_begun_with_flags_of_training_goes_on(tmp_path):
    args = checked("baseline", ["--model", "popularity"])[0]
    write_json(tmp_path / "run.json", {"model": "popularity", "num_train_epochs": 1, "seed": 7})
    leaderboard._note_as_asked(tmp_path, args)
    noted = read_json(tmp_path / "run.json")
    assert noted == {"model": "popularity", "num_train_epochs": 200, "seed": 7}
    # Where another model's run lies, what it noted is its own, and nothing is written elsewhere.
    write_json(tmp_path / "run.json", other := {"model": "sasrec", "num_train_epochs": 1})
    leaderboard._note_as_asked(tmp_path, args)
    assert read_json(tmp_path / "run.json") == other
    leaderboard._note_as_asked(tmp_path / "gone", args)
    assert not (tmp_path / "gone").exists()
