"""The encoder as ONNX, checked against the packed encoder before it is kept.

`encoder.onnx` reads a right-padded batch, as `RecformerTokenizer` makes it (`input_ids`,
`attention_mask`, `token_type_ids`, `item_position_ids`, (B, L) int64 each, any B and L up to
`max_length` of the manifest), and gives `vector` (B, D) float32:

* of a model finetuned as published, or only pretrained: the pooled vector of a history or an item,
  not divided by its length;
* of a model with a head: the vector of a single item from its text, of length 1. Histories need no
  encoder there (`recformer.export.vectors`).

`encoder.int8.onnx` has the weights of all products in 8 bits; the manifest says how near its
vectors are to the others, `python -m benchmarks.onnx_encoder` what that costs in NDCG.

Shapes: B sequences, L padded length, D dimension of the vectors.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recformer.data.collators import pack_sequences
from recformer.data.items import ItemsInMemory
from recformer.export.folders import exported_folder
from recformer.files import UserError
from recformer.models import RecformerForCatalogue, RecformerForSeqRec
from recformer.models.catalogue import token_bags
from recformer.models.dense import INPUTS, DenseEncoder, DenseItemEncoder
from recformer.tokenization import Item, RecformerTokenizer
from recformer.training.start import weights_hash

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
TOLERANCE = 1e-4  # greatest difference of a number, beside the packed encoder
ITEMS_CHECKED = 24  # alone, and as histories of several lengths


def require_packages() -> None:
    """Refuse to begin without the packages.

    Raises:
        UserError: names what is missing and the extra that brings it.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'recformer[onnx]'")


def dense_form(
    model: RecformerForSeqRec | RecformerForCatalogue,
) -> DenseEncoder | DenseItemEncoder:
    """The module that is exported; see the head of this one."""
    if isinstance(model, RecformerForCatalogue):
        return DenseItemEncoder(model)
    return DenseEncoder(model.longformer)


def inputs_of(
    tokenizer: RecformerTokenizer, sequences: Sequence[Sequence[Item]]
) -> dict[str, NDArray[np.int64]]:
    """The inputs of the exported encoder for B sequences of items, oldest first."""
    batch = tokenizer.batch_encode(sequences)
    return {name: np.array(batch[name], dtype=np.int64) for name in INPUTS}


def write_onnx(module: torch.nn.Module, path: Path, example: dict[str, NDArray[np.int64]]) -> None:
    """`module` as an ONNX file with any batch size and length.

    Args:
        example: inputs of at least two sequences and two tokens.
    """
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    arguments = tuple(torch.from_numpy(example[name]) for name in INPUTS)
    with _silent(), torch.no_grad():
        torch.onnx.export(
            module,
            arguments,
            path,
            input_names=list(INPUTS),
            output_names=["vector"],
            dynamic_shapes=dict.fromkeys(INPUTS, sizes),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def write_int8(path: Path, target: Path) -> None:
    """The same model with the constant factor of every product in 8 bits, scaled by columns."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _silent():
        quantize_dynamic(
            path,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )


class OnnxEncoder:
    """An exported encoder, run by onnxruntime.

    Args:
        path: `encoder.onnx` or `encoder.int8.onnx`.
        threads: of onnxruntime; 0: as many as it likes.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)

    def __call__(self, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """(B, D) vectors of the inputs that `inputs_of` gives."""
        (vectors,) = self.session.run(["vector"], inputs)
        return vectors


def export_encoder(
    model: RecformerForSeqRec | RecformerForCatalogue,
    tokenizer: RecformerTokenizer,
    items: Sequence[Item],
    folder: Path,
    name: str,
    int8: bool = False,
) -> dict[str, Any]:
    """Write `encoder.onnx`, with `int8` `encoder.int8.onnx` too, tokenizer and manifest.

    Args:
        model: encoder, in float32.
        items: of the catalogue; the files are checked on some of them.
        folder: appears whole or not at all.
        name: what the manifest calls the model.

    Returns:
        The manifest, without the files.

    Raises:
        UserError: missing packages, a folder with other files, or a file that gives other vectors
            than the packed encoder.
    """
    require_packages()
    model = model.cpu().eval()
    dense = dense_form(model)
    alone = isinstance(dense, DenseItemEncoder)
    sequences = _checks(_checkable(items, tokenizer), alone)
    checks = [inputs_of(tokenizer, each) for each in sequences]
    manifest: dict[str, Any] = {
        "model": name,
        "weights": weights_hash(model),
        "pooler": model.config.pooler_type,
        "reads": "an item" if alone else "items, oldest first",
        "normalised": alone,
        "max_length": min(dense.max_length, model.config.max_token_num),
        "opset": OPSET,
    }
    with exported_folder(folder, manifest) as partial:
        plain = partial / "encoder.onnx"
        write_onnx(dense, plain, checks[0])
        expected = [_expected(model, tokenizer, each) for each in sequences]
        encode = OnnxEncoder(plain)
        found = [encode(inputs) for inputs in checks]
        error = max(float(np.abs(f - e).max()) for f, e in zip(found, expected, strict=True))
        if not error <= TOLERANCE:
            raise UserError(
                f"onnxruntime gives vectors that differ by {error:.2g} from the packed encoder's, "
                f"expected at most {TOLERANCE:g}: nothing was written"
            )
        manifest["dimension"] = int(expected[0].shape[1])
        manifest["greatest_difference"] = error
        if int8:
            write_int8(plain, partial / "encoder.int8.onnx")
            encode = OnnxEncoder(partial / "encoder.int8.onnx")
            cosines = np.concatenate(
                [_cosines(encode(i), e) for i, e in zip(checks, expected, strict=True)]
            )
            manifest["int8_cosines"] = {
                "mean": float(cosines.mean()),
                "least": float(cosines.min()),
            }
        tokenizer.save_pretrained(partial)
        model.config.save_pretrained(partial)
    return manifest


def _checkable(items: Sequence[Item], tokenizer: RecformerTokenizer) -> list[Item]:
    """The first items that have a text and are not cut."""
    most = tokenizer.config.max_token_num
    found = [item for item in items[:1000] if 0 < len(tokenizer.encode_item(item)[0]) < most]
    if not found:
        raise UserError("no item of the catalogue has a text to check the exported encoder with")
    return found[:ITEMS_CHECKED]


def _checks(items: Sequence[Item], alone: bool) -> list[list[list[Item]]]:
    """Batches of sequences: single items, and histories of 1, 2, … items that grow long."""
    some = [items[place % len(items)] for place in range(ITEMS_CHECKED)]
    batches: list[list[list[Item]]] = [[[item] for item in some], [[some[0]]]]
    if not alone:
        batches.append([some[:size] for size in (1, 2, 5, 10, ITEMS_CHECKED)])
    return batches


@torch.no_grad()
def _expected(
    model: RecformerForSeqRec | RecformerForCatalogue,
    tokenizer: RecformerTokenizer,
    sequences: list[list[Item]],
) -> NDArray[np.float32]:
    """(B, D) as the product gives them: by the packed encoder, and the head behind it."""
    store = ItemsInMemory.of([item for each in sequences for item in each], tokenizer)
    ends = np.cumsum([len(each) for each in sequences])
    rows = np.split(np.arange(len(store)), ends[:-1])
    vectors = model.longformer.encode(pack_sequences(store, rows, model.config))
    if isinstance(model, RecformerForCatalogue):
        vectors = model.head.text_vectors(vectors, token_bags(store))
    return vectors.float().numpy()


def _cosines(left: NDArray, right: NDArray) -> NDArray[np.float64]:
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left.astype(np.float64) * right).sum(axis=1) / lengths


@contextmanager
def _silent() -> Iterator[None]:
    """Without the exporters' own notes: what they did is checked here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
