"""Start weights, and what pretraining wrote converted: nothing lost, no holes let through."""

from __future__ import annotations

import os
import runpy
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LongformerConfig,
    LongformerForMaskedLM,
)

from recformer import RecformerTokenizer
from recformer.checkpoints.backbones import backbone_config
from recformer.checkpoints.conversion import convert_pretraining, find_start, save_start_weights
from recformer.checkpoints.loading import load_checkpoint
from recformer.checkpoints.reading import read_checkpoint, read_state_dict
from recformer.files import UserError
from recformer.models import RecformerForPretraining, RecformerForSeqRec, RecformerModel
from recformer.packing import PackedTokens
from tests.tiny import SIZES, randomised, same, snapshot, tiny_config

ROOT = Path(__file__).resolve().parents[2]
WORDS = "longformer.embeddings.word_embeddings.weight"
IDS = "longformer.embeddings.position_ids"
FOLDER = "recformer_pretrain_ckpt"
PAIR = ("recformer_pretrain_ckpt.bin", "seqrec_pretrain_ckpt.bin")


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs a script of the root as `python NAME ARGUMENTS` does, within this process."""

    def run(name: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as left:
            code = int(left.code or 0)
        output = capsys.readouterr()
        return Result(code, output.out, output.err)

    return run


def save_folder(model: RecformerForPretraining, folder: Path) -> Path:
    """`model` as pretraining leaves it in `start/`: weights, configuration, tokenizer."""
    model.save_pretrained(folder)
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    vocabulary = folder.parent / "vocabulary"
    vocabulary.mkdir(exist_ok=True)
    (vocabulary / "vocab.txt").write_text("\n".join(words) + "\n")
    RecformerTokenizer.from_pretrained(vocabulary, model.config).save_pretrained(folder)
    return folder


def trained_from(start: RecformerForPretraining) -> dict[str, Tensor]:
    """Everything but the word embeddings has moved."""
    return {
        key: value.clone() if key == WORDS else value + 0.125
        for key, value in snapshot(start).items()
    }


@pytest.fixture
def start(tmp_path: Path) -> RecformerForPretraining:
    """Start weights, saved to `tmp_path/run/start`; their pooling is not the default's."""
    model = randomised(RecformerForPretraining(tiny_config(pooler_type="avg", max_token_num=20)))
    save_folder(model, tmp_path / "run" / "start")
    return model


# --- start weights ----------------------------------------------------------------------------


def test_start_weights_of_a_longformer(tmp_path: Path) -> None:
    longformer = randomised(
        LongformerForMaskedLM(LongformerConfig(**SIZES, pad_token_id=1, max_position_embeddings=40))
    )
    longformer.save_pretrained(tmp_path / "longformer")
    output = tmp_path / "new" / "start.bin"
    report = save_start_weights(
        tmp_path / "longformer", output, max_token_num=30, max_item_embeddings=5
    )
    model = RecformerForPretraining(
        backbone_config(tmp_path / "longformer", max_token_num=30, max_item_embeddings=5)
    )
    loaded = load_checkpoint(model, output)
    written, theirs = read_state_dict(output), longformer.state_dict()
    assert sorted(loaded.copied) == sorted(set(written) - {IDS}) == sorted(model.state_dict())
    assert (loaded.filled, loaded.new) == ({}, {})
    assert loaded.left_over == {IDS: "a buffer, not a weight"}
    assert written[IDS].dtype == torch.int64
    assert torch.equal(written[IDS], torch.arange(40)[None])
    for key in (WORDS, "lm_head.dense.weight", "lm_head.decoder.weight", "lm_head.bias"):
        assert torch.equal(written[key], theirs[key]), key
    types = theirs["longformer.embeddings.token_type_embeddings.weight"]
    assert torch.equal(
        written["longformer.embeddings.token_type_embeddings.weight"], types[:1].repeat(4, 1)
    )
    assert written["longformer.embeddings.item_position_embeddings.weight"].shape == (5, 16)
    assert list(report.new) == ["embeddings.item_position_embeddings.weight"]
    # the same values again
    save_start_weights(
        tmp_path / "longformer", tmp_path / "again.bin", max_token_num=30, max_item_embeddings=5
    )
    assert same(read_state_dict(tmp_path / "again.bin"), written)


def test_the_script_writes_and_reports(tmp_path: Path, script: Callable[..., Result]) -> None:
    randomised(BertModel(BertConfig(**SIZES))).save_pretrained(tmp_path / "bert")
    output = tmp_path / "start.bin"
    arguments = ("--model_name_or_path", tmp_path / "bert", "--output_path", output)
    result = script("save_longformer_ckpt.py", *arguments, "--max_token_num", 20)
    assert result.returncode == 0, result.stderr
    assert "35 tensors copied, 15 filled, 7 new, 2 left over" in result.stdout
    assert "new: embeddings.item_position_embeddings.weight, lm_head.dense.weight (normal" in (
        result.stdout
    )
    assert f"--model_name_or_path {tmp_path / 'bert'} --max_token_num 20" in result.stdout
    state = read_state_dict(output)
    assert state["longformer.embeddings.item_position_embeddings.weight"].shape == (51, 16)
    model = RecformerForPretraining(backbone_config(tmp_path / "bert", max_token_num=20))
    assert len(load_checkpoint(model, state).copied) == len(state) - 1 == 57


def test_start_weights_from_nothing_suitable(tmp_path: Path, script: Callable[..., Result]) -> None:
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    DistilBertModel(config).save_pretrained(tmp_path / "distilbert")
    with pytest.raises(UserError, match="'distilbert', which cannot be a backbone"):
        save_start_weights(tmp_path / "distilbert", tmp_path / "start.bin")
    with pytest.raises(UserError, match="is a folder, expected the name of a file"):
        save_start_weights(tmp_path / "distilbert", tmp_path)
    result = script("save_longformer_ckpt.py", "--model_name_or_path", tmp_path / "nowhere")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "nowhere does not exist, expected a model folder" in result.stderr
    assert not (tmp_path / "start.bin").exists()


def published_shapes(layers: int, h: int, inner: int, words: int, rows: int, items: int) -> dict:
    """Names and shapes of the tensors of the published classes, without `longformer.`; the head
    under its own names."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (h,), f"{name}.bias": (h,)}

    tables = {"word": words, "position": rows, "token_type": 4, "item_position": items}
    shapes: dict[str, tuple[int, ...]] = {"embeddings.position_ids": (1, rows)}
    shapes |= {f"embeddings.{name}_embeddings.weight": (n, h) for name, n in tables.items()}
    shapes |= norm("embeddings.LayerNorm")
    for number in range(layers):
        layer = f"encoder.layer.{number}."
        for name in ("query", "key", "value"):
            shapes |= linear(f"{layer}attention.self.{name}", h, h)
            shapes |= linear(f"{layer}attention.self.{name}_global", h, h)
        shapes |= linear(f"{layer}attention.output.dense", h, h)
        shapes |= norm(f"{layer}attention.output.LayerNorm")
        shapes |= linear(f"{layer}intermediate.dense", inner, h)
        shapes |= linear(f"{layer}output.dense", h, inner)
        shapes |= norm(f"{layer}output.LayerNorm")
    head = linear("lm_head.dense", h, h) | norm("lm_head.layer_norm")
    return shapes | head | linear("lm_head.decoder", words, h) | {"lm_head.bias": (words,)}


def test_released_files_have_the_published_tensors(tmp_path: Path) -> None:
    """Strict loading by the published classes: 271 tensors of the model, 278 with the head."""
    config = tiny_config(num_hidden_layers=12, max_token_num=20)
    model = randomised(RecformerForPretraining(config))
    save_folder(model, tmp_path / "run" / "start")
    path, export = tmp_path / "run" / "pytorch_model.bin", tmp_path / "export" / "fp32.bin"
    torch.save(model.state_dict(), path)
    _, written = convert_pretraining(path, tmp_path / "out", export_file=export)
    assert written[-1] == export
    expected = published_shapes(12, 16, 24, 50, 40, 5)
    whole = {k if k.startswith("lm_head.") else f"longformer.{k}": v for k, v in expected.items()}
    bare = {k: v for k, v in expected.items() if not k.startswith("lm_head.")}
    exported = {f"_forward_module.model.{k}": v for k, v in whole.items()}
    assert (len(bare), len(whole)) == (271, 278)
    for file, names in ((PAIR[0], bare), (PAIR[1], whole), (export, exported)):
        state = torch.load(tmp_path / "out" / file, weights_only=True)
        assert {key: tuple(value.shape) for key, value in state.items()} == names
        (ids,) = (value for key, value in state.items() if key.endswith("position_ids"))
        assert ids.tolist() == [list(range(40))]
        assert {value.dtype for value in state.values() if value is not ids} == {torch.float32}
        assert ids.dtype == torch.int64
    convert_pretraining(export, tmp_path / "again", start_weights=tmp_path / "run" / "start")
    assert same(
        torch.load(tmp_path / "again" / PAIR[1], weights_only=True),
        torch.load(tmp_path / "out" / PAIR[1], weights_only=True),
    )


# --- conversion -------------------------------------------------------------------------------


def check_released(output: Path, expected: dict[str, Tensor]) -> None:
    """The pair and the folder hold `expected`, each under its class's keys, and load."""
    assert sorted(path.name for path in output.iterdir()) == sorted([FOLDER, *PAIR])
    bare = torch.load(output / PAIR[0], weights_only=True)
    seqrec = torch.load(output / PAIR[1], weights_only=True)
    assert same(seqrec, expected | {IDS: torch.arange(40)[None]})
    without_head = {k: v for k, v in seqrec.items() if not k.startswith("lm_head.")}
    assert same({f"longformer.{k}": v for k, v in bare.items()}, without_head)
    config = tiny_config(pooler_type="avg", max_token_num=20)
    RecformerModel(config).load_state_dict(bare)
    model = RecformerForSeqRec(config)
    model.load_state_dict(without_head)
    left_over = set(load_checkpoint(model, seqrec).left_over)
    assert left_over == {key for key in seqrec if key.startswith("lm_head.")} | {IDS}
    folder = RecformerForPretraining.from_pretrained(output / FOLDER)
    assert same(snapshot(folder), expected)
    assert folder.config.pooler_type == "avg"
    assert folder.config.max_token_num == 20
    encoder = RecformerModel.from_pretrained(output / FOLDER).state_dict()
    assert torch.equal(encoder[WORDS.removeprefix("longformer.")], expected[WORDS])
    tokenizer = RecformerTokenizer.from_pretrained(output / FOLDER)
    assert tokenizer([{"title": "w3"}])["input_ids"][0] == 2


@pytest.mark.parametrize("form", ["bin", "lightning", "shards", "index"])
def test_every_form_of_a_checkpoint(
    tmp_path: Path, start: RecformerForPretraining, form: str
) -> None:
    expected = trained_from(start)
    run = tmp_path / "run"
    if form == "bin":
        path = run / "pytorch_model.bin"
        state = {"_forward_module.model." + key: value for key, value in expected.items()}
        torch.save(state | {"model.longformer.embeddings.position_ids": torch.ones(1, 40)}, path)
    elif form == "lightning":
        path = run / "epoch=1.ckpt"
        state = {"model." + key: value for key, value in expected.items()}
        run_facts = {"epoch": 1, "global_step": 12, "pytorch-lightning_version": "2.6"}
        torch.save({"state_dict": state} | run_facts, path)
    else:
        path = run / "epoch=1.ckpt" / "pytorch_model.bin"
        keep = randomised(RecformerForPretraining(tiny_config()))
        load_checkpoint(keep, expected)
        keep.save_pretrained(path, max_shard_size="4KB")
        (path / "config.json").unlink()
        assert len(list(path.glob("*.safetensors"))) > 2
        path = path / "model.safetensors.index.json" if form == "index" else path
    report, written = convert_pretraining(path, tmp_path / "out")
    check_released(tmp_path / "out", expected)
    assert written == [tmp_path / "out" / name for name in (*PAIR, FOLDER)]
    assert not report.new
    assert f"configuration and tokenizer of {run / 'start'}" in report.notes
    if form == "lightning":
        assert "a Lightning checkpoint, epoch 1, global_step 12" in str(report)
    # a second conversion replaces the first
    convert_pretraining(path, tmp_path / "out", max_attr_num=2)
    folder = RecformerForPretraining.from_pretrained(tmp_path / "out" / FOLDER)
    assert folder.config.max_attr_num == 2


@pytest.mark.parametrize("kept", ["not at all", "bfloat16", "rounded to bfloat16", "float16"])
def test_frozen_word_embeddings_are_those_of_the_start(
    tmp_path: Path, start: RecformerForPretraining, kept: str
) -> None:
    expected = trained_from(start)
    state = dict(expected)
    rounded = {
        "bfloat16": expected[WORDS].bfloat16(),
        "rounded to bfloat16": expected[WORDS].bfloat16().float(),
        "float16": expected[WORDS].half(),
    }
    del state[WORDS]
    if kept in rounded:
        state[WORDS] = rounded[kept]
        assert not torch.equal(state[WORDS].float(), expected[WORDS])
    path = tmp_path / "run" / "pytorch_model.bin"
    torch.save(state, path)
    report, _ = convert_pretraining(path, tmp_path / "out")
    check_released(tmp_path / "out", expected)
    assert list(report.filled) == [WORDS]
    assert "frozen in training" in report.filled[WORDS]


def test_trained_word_embeddings_stay(tmp_path: Path, start: RecformerForPretraining) -> None:
    expected = {key: value + 0.125 for key, value in snapshot(start).items()}
    path = tmp_path / "run" / "pytorch_model.bin"
    torch.save(expected, path)
    report, _ = convert_pretraining(path, tmp_path / "out")
    check_released(tmp_path / "out", expected)
    assert not report.filled


def test_start_weights_may_be_a_file(tmp_path: Path, start: RecformerForPretraining) -> None:
    """Configuration and tokenizer then come from `model_name_or_path`."""
    expected = trained_from(start)
    torch.save(start.state_dict(), tmp_path / "start.bin")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "pytorch_model.bin"
    torch.save({key: value for key, value in expected.items() if key != WORDS}, path)
    name = tmp_path / "run" / "start"
    with pytest.raises(UserError, match=r"lacks the word embeddings.*--start_weights"):
        convert_pretraining(path, tmp_path / "out", model_name_or_path=name)
    convert_pretraining(
        path, tmp_path / "out", start_weights=tmp_path / "start.bin", model_name_or_path=name
    )
    check_released(tmp_path / "out", expected)


def test_the_start_folder_is_found_beside_the_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    (run / "start").mkdir(parents=True)
    assert find_start(run / "x.ckpt") is None
    (run / "start" / "config.json").write_text("{}")
    for below in ("x.ckpt", "x.ckpt/checkpoint", "best/x.ckpt/pytorch_model.bin/model.index.json"):
        assert find_start(run / below) == run / "start"
    assert find_start(run / "w/x/y/z/model.bin") is None
    assert find_start(tmp_path / "a" / "model.bin") is None


def broken_states(start: RecformerForPretraining) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Checkpoints with a hole each, and what must be said of it."""
    whole = trained_from(start)
    query = "longformer.encoder.layer.1.attention.self.query.weight"
    nan = whole[query].clone()
    nan[3, 3] = float("nan")
    return {
        "a key": (
            {k: v for k, v in whole.items() if k != query},
            r"lacks 1 of the 57 tensors of the model: longformer\.encoder\.layer\.\*\.attention\."
            r"self\.query\.weight$",
        ),
        "the head": (
            {k: v for k, v in whole.items() if not k.startswith("lm_head.")},
            r"lacks 7 of the 57 tensors of the model: lm_head\.bias",
        ),
        "a shape": (
            whole | {query: torch.zeros(16, 8)},
            r"layer\.1\.attention\.self\.query\.weight is \(16, 8\) in the file and \(16, 16\)",
        ),
        "a value": (whole | {query: nan}, r"not finite in encoder\.layer\.\*\.attention\.self\.q"),
        "other words": (
            whole | {WORDS: (whole[WORDS] + 0.5).bfloat16()},
            "word embeddings .* were frozen in training, but they are not those of",
        ),
        "more words": (
            whole | {WORDS: torch.zeros(51, 16)},
            r"is \(51, 16\) in .* and \(50, 16\) in the start weights",
        ),
        "another model": ({"seq_norm.weight": torch.ones(3)}, "looks like an unknown model"),
    }


def test_holes_are_refused_and_nothing_is_written(
    tmp_path: Path, start: RecformerForPretraining
) -> None:
    path = tmp_path / "run" / "pytorch_model.bin"
    for name, (state, message) in broken_states(start).items():
        torch.save(state, path)
        with pytest.raises(UserError, match=message):
            convert_pretraining(path, tmp_path / "out")
        assert not (tmp_path / "out").exists(), name


def test_longer_sequences_than_there_are_positions_for(
    tmp_path: Path, start: RecformerForPretraining
) -> None:
    path = tmp_path / "run" / "pytorch_model.bin"
    torch.save(trained_from(start), path)
    with pytest.raises(UserError, match=r"has positions for 38 tokens.* max_token_num 39: give"):
        convert_pretraining(path, tmp_path / "out", max_token_num=39)
    convert_pretraining(path, tmp_path / "out", max_token_num=38)
    folder = RecformerForPretraining.from_pretrained(tmp_path / "out" / FOLDER)
    assert folder.config.max_token_num == 38
    assert folder.config.max_position_embeddings == 40


def test_nothing_of_the_users_is_overwritten(
    tmp_path: Path, start: RecformerForPretraining
) -> None:
    path = tmp_path / "run" / "pytorch_model.bin"
    torch.save(trained_from(start), path)
    notes = tmp_path / "out" / FOLDER / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(UserError, match="exists and is no model folder"):
        convert_pretraining(path, tmp_path / "out")
    with pytest.raises(UserError, match=r"notes\.txt is a file, expected a folder"):
        convert_pretraining(path, notes)
    assert notes.read_text() == "mine"
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [FOLDER]
    with pytest.raises(FileNotFoundError, match=r"start weights .*absent\.bin do not exist"):
        convert_pretraining(path, tmp_path / "other", start_weights=tmp_path / "absent.bin")


# --- DeepSpeed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three DeepSpeed checkpoints of two ranks, see zero_ranks.py, beside `start`."""
    pytest.importorskip("deepspeed")
    run = tmp_path_factory.mktemp("run")
    model = randomised(RecformerForPretraining(tiny_config(pooler_type="avg", max_token_num=20)))
    save_folder(model, run / "start")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "zero_ranks.py"), str(run / "start"), str(run)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return run


def two_sequences(length: int, seed: int) -> PackedTokens:
    """As in zero_ranks.py."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (2 * length,), generator=generator)
    kinds = torch.ones(2 * length, dtype=torch.long)
    return PackedTokens(ids, kinds, kinds, torch.tensor([0, length, 2 * length]))


def test_two_ranks_become_the_model_that_was_trained(ranks: Path, tmp_path: Path) -> None:
    trained = torch.load(ranks / "trained.pt", weights_only=True)
    report, _ = convert_pretraining(ranks / "float32.ckpt", tmp_path / "out")
    check_released(tmp_path / "out", trained["float32"])
    start = read_state_dict(ranks / "start")
    moved = [key for key, value in start.items() if not torch.equal(value, trained["float32"][key])]
    assert len(moved) > 50  # it was trained, but for the word embeddings
    assert WORDS not in moved
    model = RecformerForPretraining.from_pretrained(tmp_path / "out" / FOLDER).eval()
    a, b = two_sequences(6, 1), two_sequences(4, 2)
    with torch.no_grad():
        scores = model.lm_head(model.longformer.encode_tokens(b)[0])
        vectors = model.longformer.encode(a)
    assert torch.equal(scores, trained["scores"])
    assert torch.equal(vectors, trained["vectors"])
    assert "ZeRO checkpoint of 2 processes, epoch 1, global_step 2" in str(report)
    assert not report.filled


def test_deepspeed_has_nothing_to_warn_of(ranks: Path) -> None:
    command = [sys.executable, "-m", "recformer", "inspect", str(ranks / "float32.ckpt")]
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Setting accelerator" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["bfloat16", "thin"])
def test_sixteen_bit_ranks_give_the_float32_weights(ranks: Path, tmp_path: Path, name: str) -> None:
    """Trained in bfloat16 there are float32 copies of all but the frozen parameters."""
    trained = torch.load(ranks / "trained.pt", weights_only=True)["bfloat16"]
    report, _ = convert_pretraining(ranks / f"{name}.ckpt", tmp_path / "out")
    state = read_state_dict(tmp_path / "out" / FOLDER)
    state |= {"lm_head.decoder.bias": state["lm_head.bias"]}  # one tensor, stored once
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert same({key: value.bfloat16() for key, value in state.items()}, trained)
    dense = state["lm_head.dense.weight"]
    assert not torch.equal(dense, dense.bfloat16().float())
    words = RecformerForPretraining.from_pretrained(ranks / "start").state_dict()[WORDS]
    assert torch.equal(state[WORDS], words)
    assert list(report.filled) == [WORDS]


def test_shards_that_deepspeed_writes_are_the_same(ranks: Path, tmp_path: Path) -> None:
    """`python zero_to_fp32.py . pytorch_model.bin` within the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    checkpoint = tmp_path / "run" / "float32.ckpt"
    shutil.copytree(ranks, tmp_path / "run")
    convert_zero_checkpoint_to_fp32_state_dict(
        str(checkpoint), str(checkpoint / "pytorch_model.bin"), max_shard_size="16KB"
    )
    assert len(list((checkpoint / "pytorch_model.bin").glob("*.bin"))) == 3
    convert_pretraining(checkpoint / "pytorch_model.bin", tmp_path / "out")
    trained = torch.load(ranks / "trained.pt", weights_only=True)["float32"]
    check_released(tmp_path / "out", trained)


def test_a_deepspeed_folder_that_is_not_whole(ranks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x.ckpt"
    shutil.copytree(ranks / "float32.ckpt", folder)
    inner = folder / "checkpoint"
    assert len(read_state_dict(inner)) == len(read_state_dict(folder)) == 57
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    part = (inner / name).read_bytes()

    (inner / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {name}: it was written by 2 processes"):
        read_checkpoint(folder)
    (inner / name).write_bytes(part[: len(part) // 2])
    with pytest.raises(UserError, match=rf"{name} is truncated or corrupt"):
        read_checkpoint(folder)
    torch.save({"optimizer_state_dict": {"x": Namespace(a=1)}}, inner / name)
    with pytest.raises(UserError, match=r"pickled objects \(argparse\.Namespace\)"):
        read_checkpoint(folder)
    (inner / name).write_bytes(part)
    (inner / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(part)
    with pytest.raises(UserError, match=r"holds zero_pp_rank_2_.*was written by 2 processes"):
        read_checkpoint(folder)
    for part_name in (name, "mp_rank_00_model_states.pt"):
        with pytest.raises(UserError, match="is a part of a DeepSpeed checkpoint: give the folder"):
            read_checkpoint(inner / part_name)
    (inner / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"mp_rank_00_model_states\.pt does not exist"):
        read_checkpoint(folder)
    shutil.rmtree(inner)
    with pytest.raises(FileNotFoundError, match=r"checkpoint does not exist, but .*latest names"):
        read_checkpoint(folder)
    with pytest.raises(UserError, match=r"several checkpoints \(x\.ckpt\): name one"):
        read_checkpoint(tmp_path)


def test_the_script_converts(ranks: Path, tmp_path: Path, script: Callable[..., Result]) -> None:
    arguments = ("--checkpoint", ranks / "thin.ckpt", "--output_dir", tmp_path / "out")
    result = script("convert_pretrain_ckpt.py", *arguments, "--max_attr_num", 2)
    assert result.returncode == 0, result.stderr
    assert "56 tensors copied, 1 filled, 0 new, 0 left over" in result.stdout
    assert f"written: {tmp_path / 'out' / PAIR[0]} " in result.stdout
    config = RecformerForPretraining.from_pretrained(tmp_path / "out" / FOLDER).config
    assert config.max_attr_num == 2

    result = script("convert_pretrain_ckpt.py", "--checkpoint", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
