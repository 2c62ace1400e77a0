"""Finetuning of Recformer on a processed folder, and its evaluation by full ranking.

`recformer finetune --data_path FOLDER --pretrain_ckpt FILE_OR_FOLDER --output_dir DIR`

Both methods first rank all test users with the start weights (zero-shot).

`--method published` (paper, section 2.4, algorithm 1)
    Stage 1: at every epoch start all items are encoded with the current model; the sequence side
    trains against that table; early stop on validation NDCG. Stage 2: the best model and its table
    are taken up again; the table stays, training goes on.
`--method head` (docs/method.md)
    Items are encoded once. A head on their vectors is trained, which knows the catalogue: who
    bought what before, what an item is bought with, what a user has already. Minutes on a CPU.

The same command again continues a run that was cut off, and prints the results of a finished one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, seed_everything

from recformer.checkpoints.card import RECOMMENDING, write_card
from recformer.cli import exit_with_message, fill, flags_parser, keep_freed_memory
from recformer.data.catalogue import write_catalogue
from recformer.data.collators import RecformerEvalCollator, RecformerTrainCollator
from recformer.data.datamodule import SeqRecDataModule
from recformer.data.histories import HistoryEvalCollator, NextItemCollator
from recformer.data.items import TokenizedItems, cache_dir
from recformer.data.processed import ProcessedFolder
from recformer.data.texts import attribute_counts
from recformer.data.token_batches import HistoryTokens
from recformer.evaluation.protocol import with_protocol
from recformer.evaluation.report import report
from recformer.evaluation.runs import Figures, RunResult, StageResult, judged
from recformer.files import UserError, atomic_folder, atomic_write, write_checksums
from recformer.models import RecformerForSeqRec
from recformer.models.catalogue import HeadOptions, RecformerForCatalogue
from recformer.processes import is_first, say
from recformer.tokenization import RecformerTokenizer
from recformer.training.arguments import (
    ACTIVATION_CHECKPOINTING,
    ModelArguments,
    RunArguments,
    flag,
)
from recformer.training.callbacks import HeadTable, ItemTable
from recformer.training.experiment import Experiment
from recformer.training.history import plot_history
from recformer.training.seeds import run_seeds, summarize
from recformer.training.start import (
    keep_no_activations,
    load_start_model,
    table_hash,
    weights_hash,
)
from recformer.training.trainer import Compute

# Evaluations without gain before a stage ends (of stage 1 and 2: published values).
PATIENCE = {"stage1": 5, "stage2": 3, "head": 2}
METHODS = ("published", "head")
# Defaults of the method where they are not those of the published one.
HEAD_DEFAULTS = {
    "num_train_epochs": 3,
    "batch_size": 128,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "verbose": 1,
    "finetune_negative_sample_size": -1,
}


# Of the head where few users give few optimizer steps.
LEAST_BATCH = 16
BATCHES_OF_FEW_USERS = 32


@dataclass
class FinetuneArguments(RunArguments, ModelArguments):
    """Finetune Recformer on a processed folder and evaluate it by full ranking."""

    method: str = flag(
        "published",
        "published: two stages, encoder and all (paper); head: the encoder stays as it is, a head "
        "on the items' vectors is trained (docs/method.md). Other defaults with head: "
        + ", ".join(f"{name} {value}" for name, value in HEAD_DEFAULTS.items()),
        choices=list(METHODS),
    )
    max_history: int = flag(
        HeadOptions.max_history,
        "head: newest items read of a history, whatever --max_item_embeddings is",
    )
    whiten: bool = flag(True, "head: decorrelate the encoder's vectors over the catalogue")
    bag_size: int = flag(HeadOptions.bag_size, "head: size of the trained token bag; 0: none")
    offsets: bool = flag(True, "head: learn an offset an item")
    next_offsets: bool = flag(
        False,
        "head: learn a second offset an item, for what comes after it; pays where the order of "
        "sequences says much",
    )
    offset_dropout: float = flag(
        HeadOptions.offset_dropout, "head: share of offsets left out of a training step"
    )
    recency: bool = flag(True, "head: newer items of the history weigh more")
    history_term: bool = flag(True, "head: items of the history have a score of their own")
    least_steps: int = flag(
        150,
        "head: with few users, whose optimizer steps would be fewer, batches are smaller and "
        "epochs more than told; 0: as told",
    )
    spare_unbought: bool = flag(True, "head: items that nobody bought are no negatives")
    spare_rare: int = flag(
        HeadOptions.spare_rare,
        "head: items of fewer training interactions, c, count as sqrt(c / spare_rare) of a "
        "negative, more of which helps rare items and costs frequent ones; 0: all alike",
    )
    pretrain_ckpt: str | None = flag(
        None,
        "start weights: a released or converted .bin file, a folder written by save_pretrained, or "
        "a language model (folder or hub id); unset: the language model --model_name_or_path",
    )
    model_name_or_path: str = flag(
        "allenai/longformer-base-4096",
        "folder or hub id that gives configuration and tokenizer where --pretrain_ckpt is a file",
    )
    tokenizer_name: str | None = flag(
        None, "folder or hub id of the tokenizer, where it is not beside the weights"
    )
    from_scratch: bool = flag(False, "random weights instead of a checkpoint")
    train_file: str = flag("train.json", "file name within --data_path")
    dev_file: str = flag("val.json", "file name within --data_path")
    test_file: str = flag("test.json", "file name within --data_path")
    item2id_file: str = flag("smap.json", "file name within --data_path")
    meta_file: str = flag("meta_data.json", "file name within --data_path")
    ckpt: str = flag(
        "best_model",
        "name of the best model's folder within --output_dir; with the ending .bin its state dict "
        "is written under that name as well, as the published code did",
    )
    stages: str = flag("both", "which stages to train", choices=["1", "2", "both"])
    zero_shot: bool = flag(
        False, "evaluate only; a finetuned checkpoint with the item vectors that it carries"
    )
    new_item_vectors: bool = flag(
        False, "with --zero_shot: encode the items anew, also where the checkpoint has vectors"
    )
    finetune_negative_sample_size: int = flag(
        1000, "uniform negatives an example; 0 or less: softmax over all items"
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "train on batches of at most so many tokens a process instead of --batch_size users, "
        "histories of similar length together: memory is bounded by it, however long histories are",
    )
    fix_word_embedding: bool = flag(False, "do not train the word embeddings")
    activation_checkpointing: bool = flag(False, ACTIVATION_CHECKPOINTING)
    preprocessing_num_workers: int = flag(8, "threads of the tokenizer")

    def check(self) -> None:
        """Refuse values that would only fail later.

        Raises:
            UserError: names the flag, its value and what is allowed.
        """
        super().check()
        self.head_options()
        foreign = [f.name for f in fields(HeadOptions) if getattr(self, f.name) != f.default]
        if self.least_steps != FinetuneArguments.least_steps:
            foreign.append("least_steps")
        if self.method == "published" and foreign:
            raise UserError(f"--{foreign[0]} is a flag of --method head")
        if self.method == "head":
            if self.stages != "both":
                raise UserError("--stages is a flag of --method published: head has one stage")
            if self.finetune_negative_sample_size > 0:
                raise UserError("--method head trains on all items: leave out the sample size")
            for name in ("fix_word_embedding", "activation_checkpointing", "max_tokens_per_batch"):
                if getattr(self, name):
                    raise UserError(f"--method head trains no encoder: leave --{name} out")
            if self.temp is not None:
                raise UserError("--method head learns its temperature: leave --temp out")
        if self.preprocessing_num_workers < 1:
            raise UserError(
                f"--preprocessing_num_workers {self.preprocessing_num_workers}: must be at least 1"
            )
        if self.from_scratch and self.pretrain_ckpt:
            raise UserError("--from_scratch and --pretrain_ckpt exclude each other")
        if self.new_item_vectors and not self.zero_shot:
            raise UserError("--new_item_vectors goes with --zero_shot: training encodes them anew")
        if Path(self.ckpt).name != self.ckpt or self.ckpt in ("", ".", ".."):
            raise UserError(f"--ckpt {self.ckpt!r}: must be a plain name within --output_dir")

    def head_options(self) -> HeadOptions:
        """The parts of the head, checked."""
        return HeadOptions(**{f.name: getattr(self, f.name) for f in fields(HeadOptions)})


class Run:
    """One finetuning run: everything that its steps share, and its folder."""

    stages: tuple[str, ...] = ("stage1", "stage2")
    schedule = "linear"
    callbacks: Sequence[Callback] = ()  # of the caller, in training

    def __init__(self, args: FinetuneArguments) -> None:
        args.check()
        self.args = args
        compute = Compute.of(args)
        self.output_dir = Path(args.output_dir)
        # Before the tokenizer's first use; its thread pool is made once.
        os.environ.setdefault("RAYON_NUM_THREADS", str(args.preprocessing_num_workers))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

        self.folder = ProcessedFolder.load(
            args.data_path,
            train_file=args.train_file,
            dev_file=args.dev_file,
            test_file=args.test_file,
            item2id_file=args.item2id_file,
            meta_file=args.meta_file,
        )
        say(
            f"{args.data_path}: {self.folder.num_users:,} users, {self.folder.num_items:,} items, "
            f"split {self.folder.split_hash[:12]}"
        )
        if self.folder.num_without_metadata:
            say(f"{self.folder.num_without_metadata:,} items have no metadata: empty sentences")
        args = self.args = self._fitted(args)
        seed_everything(args.seed, verbose=False)
        self.model, self.tokenizer = self._load_model()
        longest, budget = self.model.config.max_token_num, args.max_tokens_per_batch
        if budget is not None and budget < longest:
            raise UserError(
                f"--max_tokens_per_batch {budget}: the longest history must fit, "
                f"at least {longest} (--max_token_num)"
            )
        most = self.model.config.max_attr_num
        unread = int((attribute_counts(self.folder.items) > most).sum())
        if unread:
            say(
                f"{unread:,} items have more than {most} attributes, of which the first {most} are "
                f"read (--max_attr_num)"
            )
        data_path = Path(args.data_path)
        self.store = TokenizedItems.open_or_build(
            self.folder.items, self.tokenizer, cache_dir(data_path, self.output_dir)
        )
        self.vectors_dir = cache_dir(data_path, self.output_dir, "vectors")
        self.data = SeqRecDataModule(
            self.folder,
            *self._collators(),
            args.batch_size,
            args.dataloader_num_workers,
            args.eval_users,
            args.seed,
            args.test_users,
            budget,
            None
            if budget is None
            else partial(HistoryTokens, store=self.store, config=self.model.config),
        )
        self.best_model = args.ckpt.removesuffix(".bin")
        # A checkpoint's own, kept.
        table = None if self.item_table == "encoded" else self.model.item_embedding
        self.experiment = Experiment(
            args,
            compute,
            self.model,
            self.data,
            asdict(args)
            | {
                "split_hash": self.folder.split_hash,
                "items": self.store.key,
                "weights": weights_hash(self.model),
                "item_table": None if table is None else table_hash(table.weight),
            },
            self.stages,
            (self.best_model, args.ckpt, "curves.png"),
            schedule=self.schedule,
        )

    def _load_model(self) -> tuple[RecformerForSeqRec, RecformerTokenizer]:
        args = self.args
        overrides = args.overrides() | {
            "item_num": self.folder.num_items,
            "finetune_negative_sample_size": args.finetune_negative_sample_size,
        }
        keeps_table = args.zero_shot and args.method == "published" and not args.new_item_vectors
        model, tokenizer, report = load_start_model(
            RecformerForSeqRec,
            args.pretrain_ckpt,
            args.model_name_or_path,
            args.tokenizer_name,
            args.from_scratch,
            overrides,
            item_names=self.folder.asins if keeps_table else None,
        )
        say(report)
        self.item_table = "encoded"
        if model.item_embedding is not None:
            self.item_table = f"of {args.pretrain_ckpt}"
            say("item vectors: those of the checkpoint; --new_item_vectors encodes them anew")
        if args.activation_checkpointing:
            keep_no_activations(model.longformer)
        if args.fix_word_embedding:
            model.longformer.embeddings.word_embeddings.weight.requires_grad_(False)
        return model, tokenizer

    def _fitted(self, args: FinetuneArguments) -> FinetuneArguments:
        """The flags, made to fit the data."""
        return args

    def _collators(self) -> tuple[Callable, Callable]:
        config = self.model.config
        return (
            RecformerTrainCollator(self.store, config),
            RecformerEvalCollator(self.store, config),
        )

    def evaluate(self, name: str) -> Figures:
        """Figures of the model as it stands, by split."""
        return self.experiment.evaluate(name, lambda: [self._item_table(every_epoch=False)])

    def train(self, stage: str, best_before: float | None) -> StageResult:
        """Train "stage1" (items anew every epoch) or "stage2" (item table kept)."""
        around = [self._item_table(every_epoch=stage == "stage1"), *self.callbacks]
        return self.experiment.train(stage, PATIENCE[stage], around, best_before)

    def _item_table(self, every_epoch: bool) -> ItemTable:
        return ItemTable(self.store, every_epoch, self.vectors_dir)

    def save_best(self, test: Mapping[str, Any]) -> None:
        """The model as it stands, its tokenizer, item vectors, item ids, texts and card as one
        folder; `test` are its figures on the test users."""
        with atomic_folder(self.output_dir / self.best_model) as folder:
            self.model.cpu().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_catalogue(folder, self.folder, self.args.meta_file)
            self._write_card(folder, test)
            write_checksums(folder)
        if self.args.ckpt != self.best_model:
            with atomic_write(self.output_dir / self.args.ckpt, "wb") as handle:
                torch.save(self.model.state_dict(), handle)

    def _write_card(self, folder: Path, test: Mapping[str, Any]) -> None:
        args, data = self.args, self.folder
        name = Path(args.data_path).resolve().name
        seen = "left out" if args.filter_seen else "kept"
        users = judged(test["num_users"], test.get("drawn_from"))
        facts = {
            "data": f"{name}: {data.num_users:,} users, {data.num_items:,} items",
            "split": data.split_hash,
            "start": args.pretrain_ckpt or args.model_name_or_path,
            "method": args.method,
            "evaluation": f"{users}, all items ranked, ties {args.ties}, items of the history "
            f"{seen}",
        }
        figures = {key: x for key, x in test.items() if "@" in key and isinstance(x, float)}
        write_card(
            folder,
            f"Recformer for {name}",
            "Recommends the next item from the texts of a history, new items too.",
            facts,
            figures,
            RECOMMENDING,
        )


class HeadRun(Run):
    """A run of `--method head`."""

    stages = ("head",)
    schedule = "cosine"
    model: RecformerForCatalogue

    def _load_model(self) -> tuple[Any, RecformerTokenizer]:
        start, tokenizer = super()._load_model()
        config = start.config
        config.head = self.args.head_options().as_dict()
        model = RecformerForCatalogue(config)
        model.longformer.load_state_dict(start.longformer.state_dict())
        return model, tokenizer

    def _fitted(self, args: FinetuneArguments) -> FinetuneArguments:
        users = int((self.folder.train.lengths >= 2).sum())

        def steps_an_epoch(batch_size: int) -> int:
            return max(1, users // (batch_size * args.gradient_accumulation_steps))

        if args.num_train_epochs * steps_an_epoch(args.batch_size) >= args.least_steps:
            return args
        batch_size = min(args.batch_size, max(LEAST_BATCH, users // BATCHES_OF_FEW_USERS))
        epochs = -(-args.least_steps // steps_an_epoch(batch_size))
        epochs = max(args.num_train_epochs, epochs)
        say(
            f"{users:,} users to train on: batches of {batch_size} and {epochs} epochs, for "
            f"{args.least_steps} optimizer steps (--least_steps)"
        )
        return replace(args, batch_size=batch_size, num_train_epochs=epochs)

    def _collators(self) -> tuple[Callable, Callable]:
        length = self.args.max_history
        return NextItemCollator(length), HistoryEvalCollator(length)

    def evaluate(self, name: str) -> Figures:
        return self.experiment.evaluate(name, lambda: [self._head_table()])

    def train(self, stage: str, best_before: float | None) -> StageResult:
        around = [self._head_table(), *self.callbacks]
        return self.experiment.train(stage, PATIENCE[stage], around, best_before)

    def _head_table(self) -> HeadTable:
        interactions = np.bincount(self.folder.train.items, minlength=self.folder.num_items)
        return HeadTable(self.store, interactions, self.vectors_dir)


def run(args: FinetuneArguments, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Finetune and evaluate; returns what `metrics.json` holds.

    Args:
        args: flags.
        callbacks: Lightning's, of a caller that watches training.
    """
    started = time.monotonic()
    this = HeadRun(args) if args.method == "head" else Run(args)
    this.callbacks = callbacks
    experiment = this.experiment
    result = experiment.finished
    leaves = () if args.zero_shot else (this.best_model, args.ckpt, "curves.png")
    with experiment.folder as folder:
        if result is None or not folder.has("ranks", *leaves):
            result = train_and_evaluate(this, started)
    if is_first():
        print("\n" + experiment.headline(result.test))
        rows = {name: entry["test"] for name, entry in result.evaluations.items()}
        print(report(rows, args.metric))
        print(f"written to {this.output_dir}: metrics.json"
              + ("" if args.zero_shot else f", curves.png, {args.ckpt}"))  # fmt: skip
    return result.as_dict()


def train_and_evaluate(this: Run, started: float) -> RunResult:
    """Do what is left of `run`, which began at `started` by the monotonic clock."""
    args = this.args
    evaluations = {"zero_shot": this.evaluate("zero_shot")}
    stages: dict[str, StageResult] = {}
    if not args.zero_shot:
        best: float | None = None
        chosen = list(this.stages) if args.stages == "both" else [f"stage{args.stages}"]
        for stage in chosen:
            this.model.train()
            stages[stage] = this.train(stage, best)
            if stages[stage].best is not None:
                best = stages[stage].best
                evaluations[stage] = this.evaluate(stage)
            else:
                evaluations[stage] = evaluations["stage1"]
                say(f"{stage} did not improve on {args.metric} {best:.4f}: stage 1's model stays")
    trained = [weight for weight in this.model.parameters() if weight.requires_grad]
    result = this.experiment.result(
        evaluations,
        stages,
        parameters=0 if args.zero_shot else sum(weight.numel() for weight in trained),
        seconds=round(time.monotonic() - started, 1),
        item_table=this.item_table,
    )
    if is_first():
        if not args.zero_shot:
            this.save_best(result.test)
            plot_history(
                {name: stage.rows for name, stage in stages.items()},
                this.output_dir / "curves.png",
                args.metric,
                evaluations["zero_shot"]["val"][args.metric],
            )
        result.save(this.output_dir)
    return result


def parse(argv: Sequence[str] | None) -> FinetuneArguments:
    """Flags of the command as their dataclass, with the defaults of the method."""
    parser = flags_parser("finetune", __doc__, FinetuneArguments)
    line = with_protocol(argv, "evaluation")
    if parser.parse_known_args(line)[0].method == "head":
        parser.set_defaults(**HEAD_DEFAULTS)
    return fill(parser, line)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    args = parse(argv)
    if args.seeds is not None:
        folders = run_seeds("finetune", argv, args.output_dir, args.num_nodes)
        if is_first():
            summarize(folders, args.output_dir)
        return
    keep_freed_memory()
    run(args)


if __name__ == "__main__":
    exit_with_message(main)
