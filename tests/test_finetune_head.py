"""`finetune --method head` end to end, small: what is written, resumed, refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recformer import finetune as entry
from recformer.data.collators import EvalExample
from recformer.data.histories import HistoryEvalCollator
from recformer.data.processed import ProcessedFolder
from recformer.files import UserError, read_json
from recformer.finetune import FinetuneArguments, main, run
from recformer.models import RecformerForSeqRec
from recformer.models.catalogue import RecformerForCatalogue
from recformer.training.lit import LitWrapper, parameter_groups
from tests import test_finetune
from tests.test_finetune import arguments, figures

shop = test_finetune.data  # the fixture


def head_arguments(shop: Path, output_dir: Path, **settings) -> FinetuneArguments:
    own = {
        "method": "head",
        "bag_size": 16,
        "num_train_epochs": 6,
        "verbose": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "least_steps": 0,
    }
    return arguments(shop, output_dir, **own | settings)


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("head")
    return output, run(head_arguments(shop, output))


def test_it_learns_and_writes_what_it_promises(finished) -> None:
    output, result = finished
    assert list(result["evaluations"]) == ["zero_shot", "head"]
    before, after = (result["evaluations"][name]["test"] for name in ("zero_shot", "head"))
    assert after["NDCG@10"] > before["NDCG@10"] + 0.02  # a colour's things come in order
    assert read_json(output / "metrics.json")["test"] == result["test"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    encoder = sum(  # which is not trained
        p.numel()
        for p in RecformerForCatalogue.from_pretrained(
            output / "best_model"
        ).longformer.parameters()
    )
    assert result["parameters"] > 0
    assert encoder > 0


def test_the_best_model_ranks_as_the_evaluation_did(shop, finished) -> None:
    output, result = finished
    model = RecformerForCatalogue.from_pretrained(output / "best_model").eval()
    folder = ProcessedFolder.load(shop / "folder")
    examples = folder.eval_examples("test")
    batch = HistoryEvalCollator(20)(
        [
            EvalExample(row, examples.histories[row], int(examples.targets[row]))
            for row in range(len(examples))
        ]
    )
    with torch.no_grad():
        users = model.read(batch.history, batch.seen)
        ranks = model.rank(users, batch.labels, filter_seen=False)
    hits = np.clip(5 - ranks.above, 0, ranks.tied + 1) / (ranks.tied + 1)
    assert hits.mean() == pytest.approx(result["test"]["Recall@5"], abs=1e-6)


def test_the_encoder_stays_and_few_numbers_learn_faster(shop, tmp_path) -> None:
    seen: list[RecformerForCatalogue] = []

    class Watched(entry.HeadRun):
        def _load_model(self):
            model, tokenizer = super()._load_model()
            seen.append(model)
            self.before = {k: v.clone() for k, v in model.longformer.state_dict().items()}
            return model, tokenizer

    this = Watched(head_arguments(shop, tmp_path, num_train_epochs=1))
    this.train("head", None)
    (model,) = seen
    for name, tensor in model.longformer.state_dict().items():
        assert torch.equal(tensor, this.before[name]), name
    groups = parameter_groups(model, 0.1, learning_rate=1e-3)
    rates = {
        name: group["lr"] for group in groups if "lr" in group for name in [id(group["params"][0])]
    }
    assert rates[id(model.head.history_factor)] == pytest.approx(1e-2)
    assert id(model.head.offset) not in rates


def test_cut_off_and_given_again_it_ends_alike(
    shop,
    tmp_path,
    finished,
    monkeypatch,
) -> None:
    step = LitWrapper.training_step

    def failing(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == 3:
            raise RuntimeError("cut off")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitWrapper, "training_step", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        run(head_arguments(shop, tmp_path))
    monkeypatch.setattr(LitWrapper, "training_step", step)
    assert figures(run(head_arguments(shop, tmp_path))) == figures(finished[1])


def test_defaults_of_the_method_and_what_does_not_go_with_it(shop, tmp_path, monkeypatch) -> None:
    taken: list[FinetuneArguments] = []
    monkeypatch.setattr(entry, "run", taken.append)
    main(["--method", "head", "--batch_size", "7"])
    main([])
    head, published = taken
    assert (head.learning_rate, head.num_train_epochs, head.batch_size) == (1e-3, 3, 7)
    assert (published.learning_rate, published.num_train_epochs) == (5e-5, 16)
    with pytest.raises(UserError, match="--bag_size is a flag of --method head"):
        arguments(shop, tmp_path, bag_size=8).check()
    with pytest.raises(UserError, match="--stages"):
        head_arguments(shop, tmp_path, stages="1").check()
    with pytest.raises(UserError, match="trains on all items"):
        head_arguments(shop, tmp_path, finetune_negative_sample_size=10).check()
    with pytest.raises(UserError, match="trains no encoder"):
        head_arguments(shop, tmp_path, fix_word_embedding=True).check()
    with pytest.raises(UserError, match="learns its temperature"):
        head_arguments(shop, tmp_path, temp=0.1).check()


@pytest.mark.parametrize("part", ["whiten", "offsets", "recency", "history_term", "spare_unbought"])
def test_every_part_can_be_left_out(shop, tmp_path, part) -> None:
    result = run(head_arguments(shop, tmp_path, num_train_epochs=1, **{part: False}))
    assert result["stages"]["head"]["best"] is not None
    saved = read_json(tmp_path / "best_model" / "config.json")["head"]
    assert saved[part] is False


def test_next_offsets_learn_what_comes_after(shop, tmp_path) -> None:
    # Every user goes round the shop in one direction: what is bought together is no direction.
    result = run(head_arguments(shop, tmp_path / "with", next_offsets=True, offset_dropout=0.0))
    saved = load_file(tmp_path / "with" / "best_model" / "model.safetensors")
    assert saved["head.next_offset"].abs().max() > 0
    assert read_json(tmp_path / "with" / "best_model" / "config.json")["head"]["next_offsets"]
    plain = run(head_arguments(shop, tmp_path / "without", offset_dropout=0.0))
    losses = [r["stages"]["head"]["rows"][1]["train/loss"] for r in (result, plain)]
    assert losses[0] < losses[1]


def test_two_processes_train_as_one(shop, tmp_path) -> None:
    settings = {"num_train_epochs": 1, "offset_dropout": 0.0, "batch_size": 8}
    one = run(head_arguments(shop, tmp_path / "one", **settings))
    flags = [
        f"--{name}={value}"
        for name, value in vars(head_arguments(shop, tmp_path / "two", **settings)).items()
        if name in ("data_path", "tokenizer_name", "output_dir", "config_overrides", "method",
                    "max_token_num", "num_train_epochs", "verbose", "learning_rate",
                    "warmup_steps", "bag_size", "offset_dropout", "gradient_accumulation_steps",
                    "least_steps")
    ]  # fmt: skip
    command = [sys.executable, "-m", "recformer.finetune", *flags, "--from_scratch"]
    command += ["--batch_size=4", "--num_processes=2", "--metric_ks", "5", "10"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_json(tmp_path / "two" / "metrics.json")
    for name, expected in one["evaluations"].items():
        for metric in ("NDCG@10", "MRR"):
            found = two["evaluations"][name]["test"][metric]
            assert found == pytest.approx(expected["test"][metric], abs=2e-3), (name, metric)


def test_few_users_get_smaller_batches_and_more_epochs(shop, tmp_path, capsys) -> None:
    this = entry.HeadRun(head_arguments(shop, tmp_path, batch_size=128, least_steps=10))
    assert (this.args.batch_size, this.args.num_train_epochs) == (16, 6)  # 40 users: 2 an epoch
    assert "batches of 16 and 6 epochs, for 10 optimizer steps" in capsys.readouterr().out
    told = entry.HeadRun(head_arguments(shop, tmp_path / "b", batch_size=8, least_steps=30))
    assert (told.args.batch_size, told.args.num_train_epochs) == (8, 6)  # 30 steps: enough
    with pytest.raises(UserError, match="--least_steps is a flag of --method head"):
        arguments(shop, tmp_path, least_steps=3).check()


def test_it_starts_from_every_kind_of_checkpoint(shop, tmp_path) -> None:
    published = arguments(
        shop, tmp_path / "published", num_train_epochs=1, stages="1", ckpt="finetuned.bin"
    )
    run(published)
    finetuned = tmp_path / "published" / "finetuned"
    expected = RecformerForSeqRec.from_pretrained(finetuned).longformer
    pretrained = tmp_path / "pretrained"  # a folder of the encoder alone, as `convert` writes it
    expected.save_pretrained(pretrained)
    starts = [
        {"pretrain_ckpt": str(finetuned)},
        {"pretrain_ckpt": f"{finetuned}.bin", "model_name_or_path": str(finetuned)},
        {"pretrain_ckpt": str(pretrained)},
    ]
    results = []
    for number, start in enumerate(starts):
        given = {"from_scratch": False, "config_overrides": None, "num_train_epochs": 2} | start
        this = entry.HeadRun(head_arguments(shop, tmp_path / str(number), **given))
        for name, tensor in this.model.longformer.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), (start, name)
        results.append(run(this.args))
    for result in results[1:]:
        assert figures(result) == figures(results[0])
    test = results[0]["evaluations"]
    assert test["head"]["test"]["NDCG@10"] > test["zero_shot"]["test"]["NDCG@10"]
