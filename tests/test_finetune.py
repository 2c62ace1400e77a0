"""Finetuning end to end, small: what is written, resuming, processes, wrong input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recformer import RecformerForSeqRec, RecformerTokenizer
from recformer import finetune as entry
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.files import UserError, read_json
from recformer.finetune import FinetuneArguments, Run, run
from recformer.recommendation import CatalogueRecommender
from recformer.tokenization import train_tokenizer
from recformer.training.experiment import Experiment
from recformer.training.item_encoder import encode_items, token_budget_batches
from recformer.training.lit import LitWrapper, parameter_groups
from recformer.training.trainer import half_precision

COLOURS = ("red", "green", "blue", "black")
SMALL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"
THINGS = ("tent", "lamp", "stove", "rope", "boots", "map")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Users who stay with a colour and go through the things in order."""
    root = tmp_path_factory.mktemp("data")
    items = [
        {"title": f"{colour} {thing}", "brand": colour} for colour in COLOURS for thing in THINGS
    ]
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(40):
        colour, start, length = (
            generator.integers(4),
            generator.integers(6),
            generator.integers(4, 8),
        )
        sequences.append([int(colour * 6 + (start + i) % 6) for i in range(length)])
    asins = [f"item{i}" for i in range(len(items))]
    write_processed(
        root / "folder",
        train=Sequences.from_lists([s[:-2] for s in sequences]),
        val=Sequences.from_lists([s[-2:-1] for s in sequences]),
        test=Sequences.from_lists([s[-1:] for s in sequences]),
        user_names=[f"u{i}" for i in range(len(sequences))],
        asins=asins,
        meta=dict(zip(asins, items, strict=True)),
        dataset={},
    )
    texts = [value for item in items for value in item.values()]
    train_tokenizer([*texts, "title", "brand"], 300, root / "tokenizer")
    return root


def arguments(data: Path, output_dir: Path, **settings) -> FinetuneArguments:
    defaults = {
        "data_path": str(data / "folder"),
        "tokenizer_name": str(data / "tokenizer"),
        "output_dir": str(output_dir),
        "from_scratch": True,
        "config_overrides": SMALL,
        "max_token_num": 48,
        "num_train_epochs": 3,
        "verbose": 2,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "finetune_negative_sample_size": -1,
        "metric_ks": [5, 10],
        "device": [-1],
    }
    return FinetuneArguments(**defaults | settings)


def figures(result: dict) -> dict:
    """What must not depend on how often a run was cut off."""
    rows = {
        name: [{k: v for k, v in row.items() if k != "seconds"} for row in stage["rows"]]
        for name, stage in result["stages"].items()
    }
    return {"evaluations": result["evaluations"], "rows": rows}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("finished")
    return output, run(arguments(data, output))


def test_a_run_writes_what_it_promises(data, finished):
    output, result = finished
    assert read_json(output / "metrics.json")["test"] == result["test"]
    assert list(result["evaluations"]) == ["zero_shot", "stage1", "stage2"]
    assert result["test"]["num_users"] == 40
    assert 5 / 24 <= result["test"]["Coverage@5"] <= 1
    assert 0 <= result["test"]["Gini@10"] < 1
    low, high = result["test"]["intervals"]["NDCG@10"]
    assert low < result["test"]["NDCG@10"] < high
    users = [part["num_users"] for part in result["test"]["slices"].values()]
    assert sum(users) == 3 * 40  # by frequency, length and repetition
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Validation at epoch 2 (--verbose 2) and at the last epoch.
    header, *rows = (output / "stage1" / "history.csv").read_text().splitlines()
    assert "val/NDCG@10" in header
    column = header.split(",").index("val/NDCG@10")
    assert [bool(row.split(",")[column]) for row in rows] == [False, True, True]

    import pyarrow.parquet as pq

    ranks = pq.read_table(output / "ranks" / "stage1_test.parquet")
    above, tied = ranks["above"].to_numpy(), ranks["tied"].to_numpy()
    recall = np.mean([np.clip(5 - a, 0, t + 1) / (t + 1) for a, t in zip(above, tied, strict=True)])
    assert result["evaluations"]["stage1"]["test"]["Recall@5"] == pytest.approx(recall)


def test_the_best_model_is_a_folder_that_recommends(data, finished):
    output, result = finished
    model = RecformerForSeqRec.from_pretrained(output / "best_model").eval()
    tokenizer = RecformerTokenizer.from_pretrained(output / "best_model")
    folder = ProcessedFolder.load(data / "folder")
    assert read_json(output / "best_model" / "smap.json")["item7"] == 7
    assert model.item_embedding.weight.shape == (24, 16)
    assert not model.item_embedding.weight.requires_grad

    examples = folder.eval_examples("test")
    card = (output / "best_model" / "README.md").read_text()
    assert f"|evaluation|{len(examples)} test users, all items ranked, ties expected" in card
    histories = [[f"item{i}" for i in examples.histories[row]] for row in range(len(examples))]
    answers = CatalogueRecommender.load(output / "best_model").recommend(histories, k=5)
    found = [f"item{i}" in answer.items for i, answer in zip(examples.targets, answers)]
    assert np.mean(found) == pytest.approx(result["test"]["Recall@5"], abs=1e-6)

    hits = 0
    for row in range(len(examples)):
        history = [folder.items[item] for item in examples.histories[row]]
        batch = tokenizer([history], pad_to_max=False, return_tensor=True)
        with torch.no_grad():
            scores = model(**batch)[0]
        target = examples.targets[row]
        hits += int((scores > scores[target]).sum() < 5)
    assert hits / len(examples) == pytest.approx(result["test"]["Recall@5"], abs=1e-6)


def test_the_same_command_again_trains_nothing(data, finished, monkeypatch):
    output, result = finished

    def refuse(*_):
        raise AssertionError("a finished run trains")

    monkeypatch.setattr(LitWrapper, "training_step", refuse)
    assert figures(run(arguments(data, output))) == figures(result)


# 18 batches of two stages of three epochs at 5 batches each: in the first epoch, after a
# validation, in the second stage.
@pytest.mark.parametrize("cuts", [(2,), (12, 3), (17, 1, 1)])
def test_a_run_that_is_cut_off_ends_the_same(data, finished, tmp_path, monkeypatch, cuts):
    step = LitWrapper.training_step
    for cut in cuts:
        left = [cut]

        def failing(self, batch, batch_idx, left=left):
            if not left[0]:
                raise RuntimeError("cut off")
            left[0] -= 1
            return step(self, batch, batch_idx)

        monkeypatch.setattr(LitWrapper, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            run(arguments(data, tmp_path))
    monkeypatch.setattr(LitWrapper, "training_step", step)
    assert figures(run(arguments(data, tmp_path))) == figures(finished[1])


def test_an_early_stop_survives_a_cut(data, tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "PATIENCE", {"stage1": 1, "stage2": 1})
    settings = {"verbose": 1, "num_train_epochs": 6, "learning_rate": 1e-9, "stages": "1"}
    whole = run(arguments(data, tmp_path / "whole", **settings))
    assert len(whole["stages"]["stage1"]["rows"]) == 2  # a first value, then one without gain

    def cut_off(*_):
        raise RuntimeError("cut off")

    monkeypatch.setattr(Experiment, "_load_best", cut_off)
    with pytest.raises(RuntimeError):
        run(arguments(data, tmp_path / "cut", **settings))
    (tmp_path / "cut" / "stage1" / "done.json").unlink()  # killed between the two
    monkeypatch.undo()
    monkeypatch.setattr(entry, "PATIENCE", {"stage1": 1, "stage2": 1})
    assert figures(run(arguments(data, tmp_path / "cut", **settings))) == figures(whole)


def test_stages_train_apart(data, finished, tmp_path):
    only_first = run(arguments(data, tmp_path / "first", stages="1"))
    assert only_first["evaluations"]["stage1"] == finished[1]["evaluations"]["stage1"]
    # Stage 2 alone keeps the table of the start weights.
    seen = []
    table = entry.ItemTable._refresh

    class Counting(entry.ItemTable):
        def _refresh(self, trainer, module):
            seen.append(trainer.current_epoch)
            table(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "ItemTable", Counting)
        run(arguments(data, tmp_path / "second", stages="2"))
        assert len(seen) == 1
        run(arguments(data, tmp_path / "both"))
        assert len(seen) == 2 + 3  # once before training, then at the start of 3 epochs


def test_a_second_stage_that_brings_nothing_leaves_the_first_ones_model(
    data, tmp_path, monkeypatch
):
    train = entry.Run.train
    # No figure is above 1, so stage 2 cannot improve on it.
    monkeypatch.setattr(
        entry.Run,
        "train",
        lambda self, stage, best: train(self, stage, best if stage == "stage1" else 1.0),
    )
    result = run(arguments(data, tmp_path, num_train_epochs=1))
    assert result["stages"]["stage2"]["best"] is None
    assert result["test"] == result["evaluations"]["stage1"]["test"]
    best = torch.load(tmp_path / "stage1" / "best.ckpt", weights_only=True)["state_dict"]
    saved = RecformerForSeqRec.from_pretrained(tmp_path / "best_model").state_dict()
    for name, tensor in saved.items():
        assert torch.equal(tensor, best[f"model.{name}"]), name


def test_a_second_stage_alone_that_is_cut_off_before_its_first_checkpoint(
    data, tmp_path, monkeypatch
):
    settings = {"stages": "2", "num_train_epochs": 1}
    whole = run(arguments(data, tmp_path / "whole", **settings))

    def cut_off(*_):
        raise RuntimeError("cut off")

    monkeypatch.setattr(entry.Run, "train", cut_off)
    with pytest.raises(RuntimeError, match="cut off"):
        run(arguments(data, tmp_path / "cut", **settings))
    monkeypatch.undo()
    assert figures(run(arguments(data, tmp_path / "cut", **settings))) == figures(whole)


def test_zero_shot_only_evaluates(data, finished, tmp_path, monkeypatch):
    # The finished run has encoded these items with these weights: nothing is encoded again.
    monkeypatch.setattr("recformer.training.item_encoder.pack_sequences", None)
    result = run(arguments(data, tmp_path, zero_shot=True))
    assert result["evaluations"] == {"zero_shot": finished[1]["evaluations"]["zero_shot"]}
    assert result["parameters"] == 0
    weights = RecformerForSeqRec.from_pretrained(finished[0] / "best_model").longformer
    assert finished[1]["parameters"] == sum(weight.numel() for weight in weights.parameters())
    assert not (tmp_path / "best_model").exists()


def test_a_finetuned_checkpoint_is_evaluated_with_its_own_table(data, finished, tmp_path):
    output, result = finished
    best = shutil.copytree(output / "best_model", tmp_path / "best")
    settings = {"from_scratch": False, "tokenizer_name": None, "config_overrides": None}
    settings |= {"zero_shot": True, "pretrain_ckpt": str(best)}
    own = run(arguments(data, tmp_path / "own", **settings))
    assert own["test"] == result["test"]
    assert own["item_table"] == f"of {best}"
    anew = run(arguments(data, tmp_path / "anew", new_item_vectors=True, **settings))
    assert anew["test"] != result["test"]
    assert anew["item_table"] == "encoded"
    # A file of the published form; configuration and tokenizer are those of the folder.
    state = RecformerForSeqRec.from_pretrained(best).state_dict()
    torch.save(state, tmp_path / "model.bin")
    file = {"pretrain_ckpt": str(tmp_path / "model.bin"), "model_name_or_path": str(best)}
    assert run(arguments(data, tmp_path / "bin", **settings | file))["test"] == result["test"]
    # Of the same items in another order: no vector stands in the row of its item.
    smap = read_json(best / "smap.json")
    (best / "smap.json").write_text(json.dumps(dict(zip(reversed(smap), smap.values()))))
    other = run(arguments(data, tmp_path / "other", **settings))
    assert other["item_table"] == "encoded"
    assert other["test"] == anew["test"]


def test_training_learns_the_order_of_things(data, tmp_path):
    settings = {"num_train_epochs": 40, "verbose": 5, "stages": "1", "batch_size": 8}
    settings |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    result = run(arguments(data, tmp_path, **settings))
    before, after = (result["evaluations"][name]["test"] for name in ("zero_shot", "stage1"))
    assert after["Recall@5"] > 0.8 > 0.5 > before["Recall@5"]


def flat(figures: dict, prefix: str = "") -> dict[str, float]:
    """All numbers of nested figures by their path."""
    numbers: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            numbers |= {f"{prefix}{name}/{end}": x for end, x in enumerate(value)}
        else:
            numbers[prefix + name] = value
    return numbers


def test_batches_by_tokens(data, tmp_path):
    settings = {"stages": "1", "num_train_epochs": 1, "max_tokens_per_batch": 64}
    this = Run(arguments(data, tmp_path / "out", **settings))
    batches = list(this.data.train_dataloader())
    assert max(batch.history.num_tokens for batch in batches) <= 64
    assert sum(len(batch.labels) for batch in batches) == len(this.data.train_set)
    assert len({len(batch.labels) for batch in batches}) > 1


def test_sampled_negatives_stand_apart(data, finished, tmp_path, capsys):
    settings = {"zero_shot": True, "metric_ks": [1, 5]}
    with pytest.raises(UserError, match=r"--sampled_negatives 24: user \d+ has met all but"):
        run(arguments(data, tmp_path, sampled_negatives=24, **settings))
    result = run(arguments(data, tmp_path, sampled_negatives=10, **settings))
    assert result["sampled_negatives"] == 10
    plain = {name: x for name, x in result["test"].items() if name != "sampled"}
    assert not [name for name in flat(plain) if "sampled" in name]
    evaluations = result["evaluations"].values()
    assert not [e for e in evaluations if "sampled" in e["val"] or "sampled" not in e["test"]]
    sampled = result["test"]["sampled"]
    assert all(name.endswith("(10 sampled)") for name in sampled if name != "intervals")
    assert set(sampled["intervals"]) == set(sampled) - {"intervals"}
    # Among 10 of the 23 other items a target stands higher: on average 10/23 of those above it.
    assert sampled["Recall@5 (10 sampled)"] > result["test"]["Recall@5"]
    assert sampled["AUC (10 sampled)"] == pytest.approx(result["test"]["AUC"], abs=0.1)
    printed = capsys.readouterr().out
    heading = printed.index("NOT comparable with the full ranking")
    assert "(10 sampled)" not in printed[:heading]
    assert "NDCG@5 (10 sampled)" in printed[heading:]


def test_attributes_that_are_not_read_are_said(data, tmp_path, capsys):
    run(arguments(data, tmp_path, zero_shot=True, max_attr_num=1))
    said = "24 items have more than 1 attributes, of which the first 1 are read (--max_attr_num)"
    assert said in capsys.readouterr().out.splitlines()
    run(arguments(data, tmp_path / "2", zero_shot=True, max_attr_num=2))
    assert "--max_attr_num" not in capsys.readouterr().out


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(data, tmp_path, seed):
    with pytest.raises(UserError, match=f"--seed {seed}: must be from 0 to 4294967295"):
        run(arguments(data, tmp_path, seed=seed))


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_equal_one(data, tmp_path, nodes, two_nodes):
    dropout = "hidden_dropout_prob=0,attention_probs_dropout_prob=0"
    quiet = {"config_overrides": f"{SMALL},{dropout}", "num_train_epochs": 2, "stages": "1"}
    quiet |= {"verbose": 1, "sampled_negatives": 10}
    one = run(arguments(data, tmp_path / "one", batch_size=10, **quiet))
    args = arguments(data, tmp_path / "two", batch_size=5, num_processes=2 // nodes, **quiet)
    argv = []
    for name, value in vars(args).items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is True:
            argv.append(f"--{name}")
        elif value not in (None, False):
            argv += [f"--{name}", str(value)]
    command = [sys.executable, "-m", "recformer.finetune", *argv]
    if nodes == 2:
        started = two_nodes(*command)
        said = [node.communicate(timeout=240) for node in started]
        assert [node.returncode for node in started] == [0, 0], said
    else:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    two = read_json(tmp_path / "two" / "metrics.json")
    for name in one["evaluations"]:
        mine, theirs = (flat(run["evaluations"][name]["test"]) for run in (one, two))
        assert theirs == pytest.approx(mine, abs=1e-6)
        assert {"Coverage@5", "sampled/NDCG@5 (10 sampled)", "slices/rare target/MRR"} <= set(mine)
    for mine, theirs in zip(
        one["stages"]["stage1"]["rows"], two["stages"]["stage1"]["rows"], strict=True
    ):
        assert theirs["train/loss"] == pytest.approx(mine["train/loss"], rel=1e-4)


def test_another_run_in_the_folder_is_refused(data, finished, tmp_path):
    output, _ = finished
    with pytest.raises(
        UserError, match=r"holds another run \(different: learning_rate, seed, weights\)"
    ):
        run(arguments(data, output, seed=7, learning_rate=1e-3))
    run(arguments(data, tmp_path / "out", zero_shot=True))
    again = {"zero_shot": True, "seed": 7}
    result = run(arguments(data, tmp_path / "out", overwrite_output_dir=True, **again))
    fresh = run(arguments(data, tmp_path / "fresh", **again))
    assert result["evaluations"] == fresh["evaluations"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": 0}, "--num_train_epochs 0"),
        ({"metric_ks": []}, "--metric_ks"),
        ({"ckpt": "../elsewhere"}, "--ckpt"),
        ({"pretrain_ckpt": "x"}, "exclude each other"),
        ({"max_token_num": 1}, "--max_token_num 1"),
        ({"config_overrides": "no_such_field=1"}, "no_such_field"),
        ({"config_overrides": "hidden_size=large"}, "hidden_size=large"),
        ({"device": [99]}, "--device 99"),
        ({"max_tokens_per_batch": 47}, "--max_tokens_per_batch 47: .* at least 48"),
        ({"eval_users": 0}, "--eval_users 0"),
        ({"weight_decay": float("nan")}, "--weight_decay nan"),
        ({"learning_rate": float("nan")}, "--learning_rate nan"),
    ],
)
def test_wrong_flags_are_refused_before_work(data, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(arguments(data, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_a_users_error(data, finished, tmp_path):
    folder = finished[0] / "best_model"
    state = RecformerForSeqRec.from_pretrained(folder).state_dict()
    words = "longformer.embeddings.word_embeddings.weight"
    state[words] = torch.full_like(state[words], torch.nan)
    torch.save(state, tmp_path / "model.bin")
    settings = {"from_scratch": False, "tokenizer_name": None, "config_overrides": None}
    settings |= {"zero_shot": True, "model_name_or_path": str(folder)}
    settings |= {"pretrain_ckpt": str(tmp_path / "model.bin"), "new_item_vectors": True}
    with pytest.raises(UserError, match="item vectors that are not finite"):
        run(arguments(data, tmp_path / "out", **settings))


def test_a_loss_that_is_not_finite_is_a_users_error(data, tmp_path, monkeypatch):
    def diverged(self, batch):
        return self.longformer.embeddings.LayerNorm.weight.sum() * torch.nan

    monkeypatch.setattr(RecformerForSeqRec, "training_loss", diverged)
    with pytest.raises(UserError, match="the loss is nan at step 0: lower the learning rate"):
        run(arguments(data, tmp_path, stages="1"))


def test_half_precision_is_what_the_hardware_has(monkeypatch):
    def turing(including_emulation: bool = True) -> bool:
        return including_emulation  # older GPUs emulate bfloat16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", turing)
    assert half_precision("cuda") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert half_precision("cuda") == "bf16-mixed"


def test_errors_of_the_command_line(tmp_path):
    command = [sys.executable, "-m", "recformer.finetune", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--data_path", str(tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_published_state_dict_continues(data, finished, tmp_path):
    """--pretrain_ckpt FILE with configuration and tokenizer from a folder; --ckpt NAME.bin."""
    output, result = finished
    folder = output / "best_model"
    settings = {"from_scratch": False, "tokenizer_name": None, "config_overrides": None}
    settings |= {"zero_shot": True, "model_name_or_path": str(folder)}
    state = RecformerForSeqRec.from_pretrained(folder).state_dict()
    torch.save(state, tmp_path / "model.bin")
    for source in (tmp_path / "model.bin", folder):
        args = arguments(data, tmp_path / source.stem, pretrain_ckpt=str(source), **settings)
        figures = run(args)["test"]
        assert 0 < figures["NDCG@10"] <= 1
        assert figures["num_users"] == result["test"]["num_users"]
    one, two = (read_json(tmp_path / name / "metrics.json") for name in ("model", "best_model"))
    assert one["test"] == two["test"]

    trained = run(arguments(data, tmp_path / "bin", ckpt="best.bin", stages="1"))
    state = torch.load(tmp_path / "bin" / "best.bin", weights_only=True)
    assert state["item_embedding.weight"].shape == (24, 16)
    assert trained["test"]["num_users"] == 40


def test_a_tokenizer_of_another_model_is_refused(data, finished, tmp_path):
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}x{i}" for i in range(200)]
    train_tokenizer(words * 5, 400, tmp_path / "big")
    settings = {"from_scratch": False, "config_overrides": None, "zero_shot": True}
    settings |= {"pretrain_ckpt": str(finished[0] / "best_model")}
    settings |= {"tokenizer_name": str(tmp_path / "big")}
    with pytest.raises(UserError, match="do not belong together"):
        run(arguments(data, tmp_path / "out", **settings))


def test_frozen_word_embeddings_do_not_move(data, finished, tmp_path):
    settings = {"from_scratch": False, "config_overrides": None, "stages": "1"}
    settings |= {"pretrain_ckpt": str(finished[0] / "best_model"), "num_train_epochs": 1}
    before = RecformerForSeqRec.from_pretrained(finished[0] / "best_model").state_dict()
    name = "longformer.embeddings.word_embeddings.weight"
    other = "longformer.encoder.layer.0.output.dense.weight"
    for frozen in (True, False):
        run(arguments(data, tmp_path / str(frozen), fix_word_embedding=frozen, **settings))
        after = RecformerForSeqRec.from_pretrained(
            tmp_path / str(frozen) / "best_model"
        ).state_dict()
        assert torch.equal(before[name], after[name]) == frozen
        assert not torch.equal(before[other], after[other])


def test_item_vectors_do_not_depend_on_the_batch(data, finished, monkeypatch):
    from recformer.data.items import TokenizedItems
    from recformer.training import item_encoder

    folder = ProcessedFolder.load(data / "folder")
    model = RecformerForSeqRec.from_pretrained(finished[0] / "best_model")
    tokenizer = RecformerTokenizer.from_pretrained(finished[0] / "best_model")
    store = TokenizedItems.open_or_build(folder.items, tokenizer, data / "cache")
    model.train()
    whole = encode_items(model, store, progress=False)
    assert model.training
    for item in range(len(folder.items)):  # row = item id
        alone = tokenizer([[folder.items[item]]], return_tensor=True)
        with torch.no_grad():
            vector = model.eval().longformer(**alone).pooler_output[0]
        torch.testing.assert_close(whole[item], vector, rtol=1e-4, atol=1e-5)
    model.train()
    monkeypatch.setattr(item_encoder, "TOKENS_PER_BATCH", 20)
    torch.testing.assert_close(encode_items(model, store, progress=False), whole)


def test_items_that_read_the_same_are_encoded_once(tmp_path, data):
    from recformer.config import RecformerConfig
    from recformer.data.items import TokenizedItems
    from recformer.training.item_encoder import distinct_items

    config = RecformerConfig(max_attr_num=3, max_attr_length=32)
    tokenizer = RecformerTokenizer.from_pretrained(data / "tokenizer", config)
    items = [{"title": "red tent"}, {}, {"title": "tent red"}, {"title": "red tent"}, {}]
    items += [{"brand": "red tent"}, {"title": "red", "brand": "tent"}]
    store = TokenizedItems.open_or_build(items, tokenizer, tmp_path)
    first, inverse = distinct_items(store)
    groups = {}
    for item, group in enumerate(inverse):
        groups.setdefault(int(group), []).append(item)
    assert sorted(groups.values()) == [[0, 3], [1, 4], [2], [5], [6]]
    assert [groups[group][0] for group in range(5)] == first.tolist()


def test_token_budget():
    lengths = np.array([5, 1, 9, 3, 30])
    batches = [batch.tolist() for batch in token_budget_batches(lengths, 9)]
    assert batches == [[1, 3, 0], [2], [4]]


def test_no_weight_decay_on_biases_and_norms():
    # SASRec's norms are called `first_norm`, GPT-2's `ln_1`: the class tells, not the name.
    model = torch.nn.ModuleDict({"ln_1": torch.nn.LayerNorm(2), "dense": torch.nn.Linear(2, 3)})
    decay, plain = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decay["params"]] == [(3, 2)]
    assert decay["weight_decay"] == 0.1
    assert sorted(tuple(p.shape) for p in plain["params"]) == [(2,), (2,), (3,)]
    assert plain["weight_decay"] == 0


def test_the_shell_script_passes_flags_on(data, finished, tmp_path, repository):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment |= {"DATA_PATH": str(data / "folder"), "OUTPUT_DIR": "out", "BATCH_SIZE": "4"}
    environment |= {"PRETRAIN_CKPT": str(finished[0] / "best_model")}
    done = subprocess.run(
        ["bash", str(repository / "finetune.sh"), "--zero_shot", "--device", "-1", "--seed", "5"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "out" / "metrics.json")["seed"] == 5
    settings = read_json(tmp_path / "out" / "run.json")
    assert (settings["batch_size"], settings["num_train_epochs"]) == (4, 128)
    assert settings["finetune_negative_sample_size"] == -1
