"""The pretraining job from end to end, resumed, refused, and on two ZeRO ranks."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recformer.files import read_checked_json
from recformer.pretrain import PretrainArguments, Run
from recformer.processes import Group
from recformer.tokenization import train_tokenizer
from recformer.training.history import StepHistory
from recformer.training.strategies import newest_whole
from tests.data.test_pretraining import catalogue, sequences

SMALL = (
    "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,"
    "initializer_range=0.2"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    contents = {"train": sequences(40, 1), "dev": sequences(12, 2), "meta_data": catalogue()}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    texts = [text for item in catalogue().values() for text in (*item, *item.values())]
    train_tokenizer(texts, 400, folder / "tokenizer")
    return {
        "train_file": str(folder / "train.json"),
        "dev_file": str(folder / "dev.json"),
        "item_attr_file": str(folder / "meta_data.json"),
        "tokenizer_name": str(folder / "tokenizer"),
    }


def arguments(inputs, output_dir, **changes) -> PretrainArguments:
    values = {
        **inputs,
        "output_dir": str(output_dir),
        "from_scratch": True,
        "config_overrides": SMALL,
        "pooler_type": "avg",
        "max_token_num": 40,
        "max_item_embeddings": 6,
        "num_train_epochs": 2,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "valid_step": 4,
        "log_step": 3,
        "dataloader_num_workers": 0,
        **changes,
    }
    return PretrainArguments(**values)


def curve(output_dir) -> list[dict[str, str]]:
    """Rows of history.csv without what depends on the machine."""
    with open(Path(output_dir) / "history.csv") as handle:
        rows = list(csv.DictReader(handle))
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_mb")} for row in rows
    ]


def last_weights(output_dir) -> dict[str, torch.Tensor]:
    path = Path(output_dir) / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


class Killed(BaseException):
    """What no part of the job catches."""


@pytest.mark.parametrize("batches", [{}, {"max_tokens_per_batch": 200}])
def test_a_killed_run_goes_on_to_the_same_curve(inputs, tmp_path, monkeypatch, batches):
    whole = Run(arguments(inputs, tmp_path / "whole", **batches)).train()
    rows = curve(tmp_path / "whole")
    assert {"train/contrastive", "train/mlm_a", "train/mlm_b", "train/grad_norm"} <= rows[0].keys()

    original, seen = StepHistory.on_train_batch_end, []

    def kill_late(self, *args):
        original(self, *args)
        seen.append(1)
        if len(seen) == 7:  # in the middle of an epoch, after a validation
            raise Killed

    monkeypatch.setattr(StepHistory, "on_train_batch_end", kill_late)
    with pytest.raises(Killed):
        Run(arguments(inputs, tmp_path / "killed", **batches)).train()
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    ckpt = "last" if batches else None  # the same command does it too
    again = Run(arguments(inputs, tmp_path / "killed", ckpt=ckpt, **batches)).train()

    for a, b in zip(curve(tmp_path / "killed"), rows, strict=True):
        assert a == b
    assert again["best"] == whole["best"]
    for name, tensor in last_weights(tmp_path / "whole").items():
        assert torch.equal(last_weights(tmp_path / "killed")[name], tensor), name


def test_a_run_is_not_overwritten_or_mixed_up(inputs, tmp_path):
    first = arguments(inputs, tmp_path / "out", num_train_epochs=1)
    Run(first).train()
    before = (tmp_path / "out" / "history.csv").read_bytes()
    result = read_checked_json(tmp_path / "out" / "metrics.json")
    assert Run(first).train() == result  # finished: printed again, not trained again
    with pytest.raises(ValueError, match=r"different: learning_rate"):
        Run(arguments(inputs, tmp_path / "out", num_train_epochs=1, learning_rate=2e-3))
    with pytest.raises(ValueError, match=r"different: learning_rate"):
        Run(
            arguments(inputs, tmp_path / "out", num_train_epochs=1, learning_rate=2e-3, ckpt="last")
        )
    assert (tmp_path / "out" / "history.csv").read_bytes() == before
    Run(arguments(inputs, tmp_path / "out", learning_rate=2e-3, overwrite_output_dir=True))
    assert not (tmp_path / "out" / "checkpoints").exists()
    with pytest.raises(FileNotFoundError, match="--ckpt last: no "):
        Run(arguments(inputs, tmp_path / "out", learning_rate=2e-3, ckpt="last"))
    with pytest.raises(FileNotFoundError, match=r"--ckpt .*none.ckpt does not exist"):
        Run(arguments(inputs, tmp_path / "out", learning_rate=2e-3, ckpt="none.ckpt"))


def test_files_of_nobody_knows_which_run_are_kept(inputs, tmp_path):
    theirs = tmp_path / "out" / "checkpoints" / "mine.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"weeks of work")
    with pytest.raises(ValueError, match="has checkpoints and no run.json"):
        Run(arguments(inputs, tmp_path / "out"))
    assert theirs.read_bytes() == b"weeks of work"
    Run(arguments(inputs, tmp_path / "out", overwrite_output_dir=True))
    assert not theirs.exists()


def test_a_checkpoint_of_another_folder_goes_on_here(inputs, tmp_path):
    Run(arguments(inputs, tmp_path / "one", num_train_epochs=1)).train()
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    here = Run(arguments(inputs, tmp_path / "two", ckpt=str(last)))
    # convert_pretrain_ckpt.py looks for it beside the checkpoints.
    assert (tmp_path / "two" / "start" / "model.safetensors").exists()
    here.train()
    assert curve(tmp_path / "two")[0] == curve(tmp_path / "one")[0]
    flags = {"ckpt": str(last), "overwrite_output_dir": True, "learning_rate": 2e-3}
    with pytest.raises(ValueError, match="--ckpt goes on with a run"):
        Run(arguments(inputs, tmp_path / "two", **flags))


def test_a_finished_run_without_its_checkpoints_keeps_the_rest(inputs, tmp_path):
    result = Run(arguments(inputs, tmp_path, num_train_epochs=1)).train()
    shutil.rmtree(tmp_path / "checkpoints")  # converted, and no longer needed
    assert Run(arguments(inputs, tmp_path, num_train_epochs=1)).train() == result
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"start", "history.csv", "curves.png", "metrics.json"} <= kept


def test_the_best_are_kept_and_the_worst_is_not(inputs, tmp_path):
    run = Run(arguments(inputs, tmp_path, num_train_epochs=4, valid_step=100, save_top_k=2))
    result = run.train()
    rows = [row for row in curve(tmp_path) if row["val/accuracy"]]
    assert len(rows) == 4  # one an epoch, though 100 batches never come together
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step*.ckpt")}
    assert len(kept) == 2
    best = max(rows, key=lambda row: float(row["val/accuracy"]))
    assert f"step={best['step']}.ckpt" in kept
    assert result["best"]["step"] == int(best["step"])
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("ablation", ["mlm", "contrast", "item_positions"])
def test_ablations_leave_out_what_they_say(inputs, tmp_path, ablation):
    run = Run(arguments(inputs, tmp_path, num_train_epochs=1, ablation=ablation))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train()
    after = run.model.state_dict()
    row = curve(tmp_path)[0]
    if ablation == "mlm":
        assert "train/mlm_a" not in row
        assert row["train/loss"] == row["train/contrastive"]
        assert torch.equal(before["lm_head.bias"], after["lm_head.bias"])
    elif ablation == "contrast":
        parts = 0.1 * (float(row["train/mlm_a"]) + float(row["train/mlm_b"]))
        assert float(row["train/loss"]) == pytest.approx(parts, rel=1e-4)
    else:
        name = "longformer.embeddings.item_position_embeddings.weight"
        assert not after[name].any()
    words = "longformer.embeddings.word_embeddings.weight"
    assert not torch.equal(before[words], after[words])


def test_word_embeddings_can_be_fixed(inputs, tmp_path):
    run = Run(arguments(inputs, tmp_path, num_train_epochs=1, fix_word_embedding=True))
    words = "longformer.embeddings.word_embeddings.weight"
    before = run.model.state_dict()[words].clone()
    run.train()
    assert torch.equal(run.model.state_dict()[words], before)
    assert not torch.equal(
        last_weights(tmp_path)["model.lm_head.bias"], torch.zeros(400)[: len(before)]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "--batch_size 1: must be at least 2"),
        ({"max_grad_norm": float("nan")}, "--max_grad_norm nan: must be at least 0"),
        ({"seed": -1}, "--seed -1: must be from 0 to 4294967295"),
        ({"mlm_probability": 0.0}, r"--mlm_probability 0.0: must be in \(0, 1\]"),
        ({"mlm_weight": 0.0}, "--ablation mlm leaves MLM out"),
        ({"learning_rate": 0.0}, "--learning_rate 0.0"),
        ({"max_tokens_per_batch": 100}, "two pairs of the longest .* at least 160"),
        ({"longformer_ckpt": "x.bin"}, "--from_scratch and --longformer_ckpt exclude"),
    ],
)
def test_wrong_flags_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Run(arguments(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_wrong_data_is_refused_before_the_model_is_built(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_load_model", lambda self: pytest.fail("the model was built"))
    bad = tmp_path / "dev.json"
    bad.write_text('[["A1"]]')
    with pytest.raises(ValueError, match="dev.json has no sequence of two items"):
        Run(arguments(inputs, tmp_path / "out", dev_file=str(bad)))


def test_more_processes_than_pairs_are_refused(inputs, tmp_path):
    dev = tmp_path / "dev.json"
    dev.write_text(json.dumps(sequences(12, 2)[:1]))
    with pytest.raises(ValueError, match="--device 2: the dev file has 1 sequences"):
        Run(arguments(inputs, tmp_path / "out", dev_file=str(dev), device=2))
    assert not (tmp_path / "out").exists()


def test_processes_of_all_nodes_count(inputs, tmp_path, monkeypatch):
    """Targets of another node are negatives of a batch of one; and each process needs a pair."""
    dev = tmp_path / "dev.json"
    dev.write_text(json.dumps(sequences(12, 2)[:1]))
    joined = []

    def join(*given):
        joined.append(given)
        return Group(0, 2, True, 0, 2, 0)

    monkeypatch.setattr("recformer.pretrain.join", join)
    with pytest.raises(ValueError, match="--device 1 on each of 2 nodes: the dev file has 1 seq"):
        Run(arguments(inputs, tmp_path / "out", dev_file=str(dev), batch_size=1))
    assert joined == [(1, False, None, "set --device to {}")]


def test_start_weights_of_another_size_are_refused(inputs, tmp_path):
    run = Run(arguments(inputs, tmp_path / "small"))
    other = {k: torch.zeros(2, 2) for k in run.model.state_dict()}
    torch.save(other, tmp_path / "start.bin")
    flags = {"from_scratch": False, "config_overrides": None, "pooler_type": None}
    flags |= {"model_name_or_path": str(tmp_path / "small" / "start")}
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        Run(
            arguments(
                inputs, tmp_path / "out", longformer_ckpt=str(tmp_path / "start.bin"), **flags
            )
        )


def zero_command(inputs, output_dir, num_train_epochs, device) -> list[str]:
    """The job with ZeRO, as a user would start it."""
    flags = arguments(inputs, output_dir, num_train_epochs=num_train_epochs, batch_size=2)
    command = [sys.executable, "-m", "recformer.pretrain", "--device", str(device)]
    command += ["--strategy", "deepspeed_stage_2", "--from_scratch"]
    flags.grad_cache = 1
    passed = {
        "grad_cache",
        "output_dir",
        "config_overrides",
        "pooler_type",
        "max_token_num",
        "batch_size",
    }
    passed |= {"max_item_embeddings", "num_train_epochs", "valid_step", "log_step"}
    passed |= {"gradient_accumulation_steps", "learning_rate", "dataloader_num_workers"}
    for name in sorted({*inputs, *passed}):
        command += [f"--{name}", str(getattr(flags, name))]
    return command


def two_zero_ranks(inputs, output_dir, num_train_epochs) -> subprocess.Popen:
    """The job on two ZeRO ranks."""
    command = zero_command(inputs, output_dir, num_train_epochs, 2)
    return subprocess.Popen(
        command,
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen) -> None:
    _, errors = job.communicate()
    assert job.returncode == 0, errors[-3000:]


def test_two_zero_ranks_from_the_shell(inputs, tmp_path):
    pytest.importorskip("deepspeed")
    finish(two_zero_ranks(inputs, tmp_path / "out", 1))
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    shards = sorted(path.name for path in last.glob("checkpoint/*optim_states.pt"))
    assert len(shards) == 2
    assert (last / "zero_to_fp32.py").exists()
    assert not list(last.parent.glob(".*"))  # nothing half-written is left
    rows = curve(tmp_path / "out")
    assert float(rows[0]["train/grad_norm"]) > 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_killed_zero_ranks_go_on_to_the_same_curve(inputs, tmp_path):
    pytest.importorskip("deepspeed")
    finish(two_zero_ranks(inputs, tmp_path / "whole", 3))
    job = two_zero_ranks(inputs, tmp_path / "killed", 3)
    while job.poll() is None and not (tmp_path / "killed" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    finish(two_zero_ranks(inputs, tmp_path / "killed", 3))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


@pytest.mark.slow
def test_zero_on_two_nodes_and_one_that_dies(inputs, tmp_path, two_nodes):
    """The curve of one node; the run goes on where the loss of a node ended it."""
    pytest.importorskip("deepspeed")
    finish(two_zero_ranks(inputs, tmp_path / "one", 3))

    def on_two_nodes(name: str) -> list[subprocess.Popen]:
        return two_nodes(*zero_command(inputs, tmp_path / name, 3, 1))

    lost = on_two_nodes("nodes")
    while lost[0].poll() is None and not (tmp_path / "nodes/checkpoints/last.ckpt").exists():
        time.sleep(0.02)
    lost[1].kill()
    said = lost[0].communicate(timeout=240)
    assert lost[0].returncode == 1, said
    assert "error: process 0 of 2 (node 0 of 2) lost the others" in said[1]
    assert "Traceback" not in said[1]
    assert not (tmp_path / "nodes" / "metrics.json").exists()

    nodes = on_two_nodes("nodes")
    said = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert said[1][0] == ""  # one rank prints
    assert curve(tmp_path / "nodes") == curve(tmp_path / "one")
    metrics = json.loads((tmp_path / "nodes" / "metrics.json").read_text())
    assert metrics["processes"] == 2


def test_a_folder_moved_aside_is_found_again(tmp_path):
    path = tmp_path / "last.ckpt"
    assert newest_whole(path) is None
    (tmp_path / ".last.ckpt.partial").mkdir()
    assert newest_whole(path) is None
    (tmp_path / ".last.ckpt.before").mkdir()
    assert newest_whole(path) == tmp_path / ".last.ckpt.before"
    path.mkdir()
    assert newest_whole(path) == path


def test_early_stop_counts_validations_without_gain(inputs, tmp_path):
    flags = {"num_train_epochs": 6, "valid_step": 100, "learning_rate": 1e-12}
    Run(arguments(inputs, tmp_path, patience=1, **flags)).train()
    rows = [row for row in curve(tmp_path) if row["val/accuracy"]]
    assert len(rows) == 2  # nothing is learned, so the second one is no better


def test_wandb_works_without_network_or_account(inputs, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no account there
    monkeypatch.setenv("WANDB_SILENT", "true")
    Run(arguments(inputs, tmp_path / "out", num_train_epochs=1, wandb=True)).train()
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
