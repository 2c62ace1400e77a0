"""Fast (Rust) tokenizers: loaded from any folder or hub id, written, and trained on a catalogue."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from recformer.config import RecformerConfig
from recformer.files import (
    UserError,
    atomic_write,
    check_folder,
    read_json,
    refuse_pointer,
    write_json,
)

# What a tokenizer may be read from.
TOKENIZER_FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    }
)

# RoBERTa's special tokens. A tokenizer trained here gives them the ids 0 to 4; RoBERTa's own
# `<mask>` is the last of its vocabulary.
BYTE_LEVEL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


# The class that transformers 4 and 5 both read as "all is in tokenizer.json".
PLAIN_CLASS = "PreTrainedTokenizerFast"


def load_fast_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder or hub id, by what the folder holds."""
    folder = Path(source)
    load: Any = AutoTokenizer.from_pretrained
    if folder.is_dir():
        refuse_pointer(folder)
        held = {path.name for path in folder.iterdir()}
        check_folder(folder, *(held & TOKENIZER_FILES))
        # AutoTokenizer cannot tell what bare vocabulary files belong to.
        if not held & {"tokenizer.json", "tokenizer_config.json"}:
            if {"vocab.json", "merges.txt"} <= held:
                load = _load_bare_roberta
            elif "vocab.txt" in held:
                load = BertTokenizerFast.from_pretrained
            else:
                raise FileNotFoundError(
                    f"{source} has no tokenizer: expected tokenizer.json, or vocab.json and "
                    "merges.txt (RoBERTa, Longformer), or vocab.txt (BERT)"
                )
        elif _is_plain(folder):
            # Straight to it: AutoTokenizer would look at config.json first, and warn of its type.
            load = PreTrainedTokenizerFast.from_pretrained
    elif folder.is_file():
        raise NotADirectoryError(f"{source} is a file, expected the folder of a tokenizer")
    elif source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source!r} does not exist, expected the folder of a tokenizer")
    try:
        return load(source, **kwargs)
    except Exception as error:  # a damaged file is a plain Exception when Rust reads it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"no tokenizer could be loaded from {source!r}, which must be a folder here or a model "
            f"of the hub: {reason}"
        ) from error


def _is_plain(folder: Path) -> bool:
    """Whether tokenizer.json says it all, as in the folders written here."""
    described = folder / "tokenizer_config.json"
    if not described.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    values = read_json(described)
    return isinstance(values, dict) and values.get("tokenizer_class") == PLAIN_CLASS


def _load_bare_roberta(
    source: str, split_special_tokens: bool = False, **_: Any
) -> PreTrainedTokenizerFast:
    """RoBERTa's and Longformer's tokenizer from vocab.json and merges.txt.

    Not through transformers, whose version 5 forgets that `<mask>` takes the space before it.
    """
    folder = Path(source)
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    missing = [token for token in BYTE_LEVEL_TOKENS if model.token_to_id(token) is None]
    if missing:
        raise UserError(f"vocab.json has no {', '.join(missing)}: not a RoBERTa or Longformer")
    backend = _byte_level(model)
    *others, mask = BYTE_LEVEL_TOKENS
    backend.add_special_tokens(others)
    backend.add_special_tokens([AddedToken(mask, lstrip=True, normalized=False)])
    return _with_roles(backend, split_special_tokens)


def _byte_level(model: models.BPE) -> Tokenizer:
    """A byte-level tokenizer that puts no space before a text."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_roles(backend: Tokenizer, split_special_tokens: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has RoBERTa's special tokens, framed and named as RoBERTa's."""
    bos, pad, eos, unk, mask = BYTE_LEVEL_TOKENS
    vocab = backend.get_vocab()
    backend.post_processor = processors.RobertaProcessing(
        (eos, vocab[eos]), (bos, vocab[bos]), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        sep_token=eos,
        pad_token=pad,
        cls_token=bos,
        mask_token=mask,
        split_special_tokens=split_special_tokens,
    )


def load_config(source: str, **kwargs: Any) -> RecformerConfig:
    try:
        values, _ = RecformerConfig.get_config_dict(source, **kwargs)
    except OSError as error:
        raise UserError(
            f"{source} has no config.json that says how long an item may be; pass config="
        ) from error
    if "max_attr_num" not in values:
        raise UserError(
            f"the config.json in {source} is of a {values.get('model_type')!r} model and has no "
            "max_attr_num, max_attr_length, …; pass config=RecformerConfig(…)"
        )
    return RecformerConfig.from_dict(values)


def save_tokenizer(
    backend: Tokenizer,
    special_tokens: Mapping[str, str],
    split_special_tokens: bool,
    folder: str | os.PathLike,
) -> None:
    """Write the tokenizer folder, in the form that both transformers 4 and 5 read."""
    folder = Path(folder)
    with atomic_write(folder / "tokenizer.json") as handle:
        handle.write(backend.to_str(pretty=True))
    # Written here and not by transformers: what 5 writes (class names, types), 4 cannot read.
    write_json(folder / "special_tokens_map.json", dict(special_tokens), indent=2)
    described = {
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": split_special_tokens,
        "tokenizer_class": PLAIN_CLASS,
    }
    write_json(folder / "tokenizer_config.json", described, indent=2)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output_dir: str | os.PathLike | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, the kind that RoBERTa and Longformer have.

    Any text can be encoded with it. The same texts give the same tokenizer; their order does not
    matter.

    Args:
        texts: attribute names and values of a catalogue, as they will be tokenised.
        vocab_size: most entries of the vocabulary, special tokens and the 256 bytes included.
            There are fewer when no pair of tokens is left that occurs twice.
        output_dir: where to write the tokenizer folder; None does not write.

    Returns:
        The tokenizer, with `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4.

    Raises:
        ValueError: no text, or a vocabulary too small for the bytes.

    Examples:
        >>> tokenizer = train_tokenizer(["red tent", "green tent", "red lamp"], vocab_size=300)
        >>> ids = tokenizer("blue lamp 7")["input_ids"]  # any text can be encoded
        >>> tokenizer.decode(ids, skip_special_tokens=True)
        'blue lamp 7'
        >>> tokenizer.convert_tokens_to_ids(["<s>", "<mask>"])
        [0, 4]
    """
    smallest = len(BYTE_LEVEL_TOKENS) + 256
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}, expected at least {smallest}: 256 bytes and "
            f"{len(BYTE_LEVEL_TOKENS)} special tokens"
        )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(BYTE_LEVEL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("no text to train a tokenizer on")
    tokenizer = _with_roles(backend, split_special_tokens=True)
    if output_dir is not None:
        save_tokenizer(backend, tokenizer.special_tokens_map, True, output_dir)
    return tokenizer
