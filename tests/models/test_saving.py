"""Saved folders: who may read them, and what is said where there are no weights."""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from recformer import RecformerForSeqRec, RecformerTokenizer
from recformer.checkpoints.backbones import load_backbone
from recformer.checkpoints.inspection import inspect_checkpoint
from recformer.checkpoints.reading import read_state_dict
from recformer.files import UserError, read_json
from recformer.recommendation import CatalogueRecommender
from tests.tiny import randomised, tiny_config, tiny_recformer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_weights_are_as_readable_as_the_umask_says(tmp_path: Path, umask: None) -> None:
    randomised(RecformerForSeqRec(tiny_config())).save_pretrained(tmp_path, max_shard_size="8KB")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len([name for name in modes if name.endswith(".safetensors")]) > 1
    assert set(modes.values()) == {0o640}


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    model = RecformerForSeqRec(tiny_config(vocab_size=5_000))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=f"too large: .{tmp_path}"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_pointer_in_place_of_weights_is_named_everywhere(tmp_path: Path) -> None:
    folder = tiny_recformer(tmp_path, ["title", "tent"])
    (folder / "smap.json").write_text("{}")
    (folder / "meta_data.json").write_text('{"a": {"title": "tent"}}')
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(POINTER)
    for read in (
        lambda: RecformerForSeqRec.from_pretrained(folder),
        lambda: CatalogueRecommender.load(folder),
        lambda: read_state_dict(folder),
        lambda: inspect_checkpoint(folder),
        lambda: load_backbone(RecformerForSeqRec, folder),
    ):
        with pytest.raises(UserError, match=r"model\.safetensors is a Git LFS pointer of 70 bytes"):
            read()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"tokenizer\.json is a Git LFS pointer"):
        RecformerTokenizer.from_pretrained(folder)
    (folder / "meta_data.json").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"meta_data\.json is a Git LFS pointer"):
        read_json(folder / "meta_data.json")


def test_weights_that_are_cut_off_are_named(tmp_path: Path) -> None:
    folder = tiny_recformer(tmp_path, ["title", "tent"])
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=f"the weights of {folder} are truncated or corrupt"):
        RecformerForSeqRec.from_pretrained(folder)
