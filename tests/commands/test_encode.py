"""Encoding a catalogue by command: what is written, what a kill costs, processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recformer import RecformerForSeqRec, RecformerTokenizer
from recformer.commands.encode import main
from recformer.data import item_vectors
from recformer.data.items import TokenizedItems
from recformer.data.processed import Sequences, write_processed
from recformer.files import UserError, read_json, write_json
from recformer.training import item_encoder
from recformer.training.item_encoder import catalogue_vectors, encode_items
from tests.tiny import tiny_recformer

COLOURS = ("red", "green", "blue", "black")
THINGS = ("tent", "lamp", "stove", "rope", "boots", "map")
TITLES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]


def write_catalogue(path: Path, titles: list[str]) -> None:
    asins = [f"A{item}" for item in range(len(titles))]
    write_processed(
        path,
        train=Sequences.from_lists([[0, 1]]),
        val=Sequences.from_lists([[2]]),
        test=Sequences.from_lists([[3]]),
        user_names=["U"],
        asins=asins,
        meta={asin: {"title": title} for asin, title in zip(asins, titles, strict=True)},
        dataset={},
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recformer(tmp_path_factory.mktemp("model"), [*TITLES, "title"])


@pytest.fixture
def flags(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(item_vectors, "BLOCK_SIZE", 8)
    write_catalogue(tmp_path / "data", [*TITLES, "red tent"])
    return [
        *("--model", str(model_folder), "--data_path", str(tmp_path / "data")),
        *("--output_dir", str(tmp_path / "out"), "--device", "-1"),
    ]


def expected_vectors(model_folder: Path, titles: list[str]) -> np.ndarray:
    """One item at a time, as a sequence of its own."""
    model = RecformerForSeqRec.from_pretrained(model_folder).eval()
    tokenizer = RecformerTokenizer.from_pretrained(model_folder)
    batches = [tokenizer([[{"title": title}]], return_tensor=True) for title in titles]
    with torch.no_grad():
        return np.stack([model.longformer(**batch).pooler_output[0].numpy() for batch in batches])


def encoded(capsys: pytest.CaptureFixture[str]) -> int:
    """How many items the command says it has encoded."""
    found = re.search(r"^(\d+) of \d+ items encoded in .* \([\d,]+ items/s\)", said(capsys), re.M)
    assert found
    return int(found[1])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_vectors_are_written_in_the_order_of_item_ids(
    flags: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(flags)
    assert encoded(capsys) == 24  # red tent comes twice
    vectors = np.load(tmp_path / "out" / "item_vectors.npy")
    assert vectors.dtype == np.float32
    expected = expected_vectors(model_folder, [*TITLES, "red tent"])
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    assert vectors[0].tobytes() == vectors[24].tobytes()
    assert read_json(tmp_path / "out" / "smap.json")["A7"] == 7


def test_the_command_again_encodes_what_is_new(
    flags: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(flags)
    first = np.load(tmp_path / "out" / "item_vectors.npy")
    said(capsys)
    main(flags)
    assert encoded(capsys) == 0
    changed = ["yellow tent", *TITLES[:5], "yellow rope", *TITLES[6:]]
    write_catalogue(tmp_path / "data", changed)
    main(flags)
    assert encoded(capsys) == 2
    vectors = np.load(tmp_path / "out" / "item_vectors.npy")
    np.testing.assert_array_equal(vectors[1:6], first[:5])
    np.testing.assert_array_equal(vectors[7:], first[6:24])
    np.testing.assert_allclose(
        vectors[[0, 6]], expected_vectors(model_folder, ["yellow tent", "yellow rope"]), atol=1e-5
    )


def killed_in_the_second_block(flags: list[str]) -> None:
    encode = RecformerForSeqRec.encode
    calls = []

    def dying(self: RecformerForSeqRec, packed: object) -> torch.Tensor:
        calls.append(packed)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, packed)

    RecformerForSeqRec.encode = dying
    main(flags)


def test_after_a_kill_only_the_rest_is_encoded(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [*flags, "--output_dir", str(tmp_path / "whole")]
    process = multiprocessing.get_context("fork").Process(
        target=killed_in_the_second_block, args=(flags,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "item_vectors.npy").exists()
    main(flags)
    assert encoded(capsys) == 16  # of 24, in blocks of 8
    write_catalogue(tmp_path / "data", [*TITLES, "red tent"])
    for path in (tmp_path / "data" / "vectors").glob("*/*"):
        shutil.rmtree(path)
    main(whole)  # never cut off: the same bits
    assert encoded(capsys) == 24
    resumed, uncut = (np.load(tmp_path / d / "item_vectors.npy") for d in ("out", "whole"))
    np.testing.assert_array_equal(resumed, uncut)


def test_two_processes_and_two_nodes_give_the_bits_of_one(
    flags: list[str], tmp_path: Path, repository: Path, two_nodes: Any
) -> None:
    main(flags)
    one = np.load(tmp_path / "out" / "item_vectors.npy")
    for path in (tmp_path / "data" / "vectors").glob("*/*"):
        shutil.rmtree(path)
    # The launcher starts the second process by the command of the first.
    (tmp_path / "small_blocks.py").write_text(
        "from recformer.data import item_vectors\nitem_vectors.BLOCK_SIZE = 8\n"
        "from recformer.cli import exit_with_message\n"
        "from recformer.commands.encode import main\nexit_with_message(main)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "small_blocks.py", *flags, "--num_processes", "2"],
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 of 25 items encoded" in done.stdout
    assert done.stdout.count("items/s") == 1  # one process speaks
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "item_vectors.npy"), one)

    for path in (tmp_path / "data" / "vectors").glob("*/*"):
        shutil.rmtree(path)
    (tmp_path / "out" / "item_vectors.npy").unlink()
    nodes = two_nodes(sys.executable, tmp_path / "small_blocks.py", *flags)
    said = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert [out.count("24 of 25 items encoded") for out, _ in said] == [1, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "item_vectors.npy"), one)


def test_precision_and_length_are_stores_of_their_own(model_folder: Path, tmp_path: Path) -> None:
    model = RecformerForSeqRec.from_pretrained(model_folder)
    tokenizer = RecformerTokenizer.from_pretrained(model_folder)
    items = TokenizedItems.open_or_build([{"title": t} for t in TITLES], tokenizer, tmp_path)
    model.train()
    plain = catalogue_vectors(model, items, tmp_path)
    assert model.training
    np.testing.assert_allclose(plain, encode_items(model, items), rtol=1e-4, atol=1e-5)
    autocast = torch.autocast("cpu", torch.bfloat16)
    half = catalogue_vectors(model, items, tmp_path, "bf16-mixed", autocast)
    assert 1e-5 < np.abs(half - plain).max() < 0.1
    unit = catalogue_vectors(model, items, tmp_path, unit_length=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    assert len(list(tmp_path.glob("item_vectors-*"))) == 3


def test_what_vectors_do_not_depend_on_does_not_cost_an_encoding(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RecformerForSeqRec.from_pretrained(model_folder)
    tokenizer = RecformerTokenizer.from_pretrained(model_folder)
    items = TokenizedItems.open_or_build([{"title": t} for t in TITLES], tokenizer, tmp_path)
    vectors = catalogue_vectors(model, items, tmp_path)
    model.config.temp, model.config.item_num = 0.5, 99
    model.init_item_embedding(torch.zeros(24, 16))
    monkeypatch.setattr(item_encoder, "pack_sequences", None)  # nothing is encoded
    np.testing.assert_array_equal(catalogue_vectors(model, items, tmp_path), vectors)
    model.config.pooler_type = "avg"
    with pytest.raises(TypeError):
        catalogue_vectors(model, items, tmp_path)


def test_a_table_of_mapped_vectors_can_be_loaded_over(model_folder: Path, tmp_path: Path) -> None:
    """A checkpoint is read into the item table in place; the store stays as it was."""
    model = RecformerForSeqRec.from_pretrained(model_folder)
    tokenizer = RecformerTokenizer.from_pretrained(model_folder)
    items = TokenizedItems.open_or_build([{"title": t} for t in TITLES], tokenizer, tmp_path)
    before = catalogue_vectors(model, items, tmp_path).copy()
    model.init_item_embedding(torch.from_numpy(catalogue_vectors(model, items, tmp_path)))
    state = model.state_dict() | {"item_embedding.weight": torch.ones(24, 16)}
    model.load_state_dict(state)
    assert (model.item_embedding.weight == 1).all()
    np.testing.assert_array_equal(catalogue_vectors(model, items, tmp_path), before)


def test_wrong_flags(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num_processes 0"):
        main([*flags, "--num_processes", "0"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main([*flags, "--data_path", str(tmp_path / "nowhere")])
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_head_is_refused(
    flags: list[str], model_folder: Path, tmp_path: Path
) -> None:
    """Its items have other vectors than the encoder's, which it would get in silence."""
    shutil.copytree(model_folder, tmp_path / "head")
    config = read_json(tmp_path / "head" / "config.json")
    write_json(tmp_path / "head" / "config.json", config | {"head": {"bag_size": 4}})
    with pytest.raises(UserError, match="was finetuned with --method head, whose item vectors"):
        main([*flags, "--model", str(tmp_path / "head")])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_no_vector_gets_another_name(
    flags: list[str], tmp_path: Path
) -> None:
    main(flags)
    whole = (tmp_path / "out" / "item_vectors.npy").read_bytes()
    assert np.load(tmp_path / "out" / "item_vectors.npy").shape == (25, 16)

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 100, len(whole) - 100))
        try:
            main(flags)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=full)
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG
    assert (tmp_path / "out" / "item_vectors.npy").read_bytes() == whole
    assert not (tmp_path / "out" / "smap.json").exists()
    main(flags)
    assert len(read_json(tmp_path / "out" / "smap.json")) == 25
