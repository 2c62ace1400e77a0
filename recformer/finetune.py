"""Two-stage finetuning and evaluation of Recformer (paper, section 2.4, algorithm 1).

`python -m recformer.finetune --data_path FOLDER --pretrain_ckpt FILE_OR_FOLDER --output_dir DIR`

1. All test users are ranked with the start weights (zero-shot).
2. Stage 1: at every epoch start all items are encoded with the current model; the sequence side
   trains against that table; early stop on validation NDCG.
3. Stage 2: the best model and its table are taken up again; the table stays, training goes on.

The same command again continues a run that was cut off, and prints the results of a finished one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import HfArgumentParser

from recformer.data.collators import RecformerEvalCollator, RecformerTrainCollator
from recformer.data.datamodule import SeqRecDataModule
from recformer.data.items import TokenizedItems, cache_dir
from recformer.data.processed import ProcessedFolder
from recformer.files import UserError, atomic_write, exit_with_message, read_json, write_json
from recformer.models import RecformerForSeqRec
from recformer.tokenization import RecformerTokenizer
from recformer.training.arguments import ModelArguments, flag
from recformer.training.callbacks import (
    EarlyStop,
    History,
    ItemTable,
    LastEpochIsValidated,
    draw_history,
)
from recformer.training.lit import LitWrapper
from recformer.training.start import load_start_model, weights_hash
from recformer.training.trainer import (
    build_trainer,
    choose_devices,
    half_precision,
    wandb_logger,
)

# Evaluations without gain before a stage ends (published values).
PATIENCE = {"stage1": 5, "stage2": 3}


@dataclass
class FinetuneArguments(ModelArguments):
    """Finetune Recformer on a processed folder and evaluate it by full ranking."""

    data_path: str = flag("finetune_data/Scientific", "processed folder (finetune_data/process.py)")
    output_dir: str = flag("result", "everything that is written goes there")
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
    zero_shot: bool = flag(False, "evaluate only")
    num_train_epochs: int = flag(16, "epochs at most, a stage")
    batch_size: int = flag(16, "users a process and step")
    gradient_accumulation_steps: int = flag(8, "batches an optimizer step")
    learning_rate: float = flag(5e-5, "peak learning rate of AdamW, of each stage")
    weight_decay: float = flag(0.0, "of AdamW; none on biases and LayerNorm")
    warmup_steps: int = flag(100, "optimizer steps of linear warm-up, of each stage")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 for no clipping")
    finetune_negative_sample_size: int = flag(
        1000, "uniform negatives an example; 0 or less: softmax over all items"
    )
    fix_word_embedding: bool = flag(False, "do not train the word embeddings")
    metric_ks: list[int] = flag([10, 50], "cut-offs of NDCG and Recall")
    ties: str = flag(
        "expected",
        "rank of a target that ties with other items",
        choices=["expected", "pessimistic", "optimistic"],
    )
    filter_seen: bool = flag(False, "take items of the history out of the candidates")
    eval_users: int | None = flag(None, "validate on a seeded sample of so many users")
    verbose: int = flag(3, "epochs between validations; the last epoch is always validated")
    device: list[int] | None = flag(
        None, "GPU indices, -1 for the CPU; unset: the first GPU if there is one", nargs="+"
    )
    num_processes: int = flag(1, "processes on the CPU (gloo); GPUs are named by --device")
    fp16: bool = flag(
        False, "16-bit mixed precision: bfloat16 where the hardware has it, else float16 on a GPU"
    )
    dataloader_num_workers: int = flag(0, "loader processes")
    preprocessing_num_workers: int = flag(8, "threads of the tokenizer")
    seed: int = flag(42, "of weights, order, targets, dropout and sampled users")
    overwrite_output_dir: bool = flag(False, "start anew where --output_dir holds another run")
    wandb: bool = flag(False, "log to Weights & Biases too (offline without an account)")

    @property
    def metric(self) -> str:
        """The metric that early stopping and the choice of the best model look at."""
        return f"NDCG@{10 if 10 in self.metric_ks else min(self.metric_ks)}"

    def check(self) -> None:
        """Refuse values that would only fail later.

        Raises:
            UserError: names the flag, its value and what is allowed.
        """
        for name in ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "verbose"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("num_processes", "preprocessing_num_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if not self.learning_rate > 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be above 0")
        if not self.metric_ks or min(self.metric_ks) < 1:
            raise UserError(f"--metric_ks {self.metric_ks}: cut-offs must be at least 1")
        if self.eval_users is not None and self.eval_users < 1:
            raise UserError(f"--eval_users {self.eval_users}: must be at least 1")
        if self.from_scratch and self.pretrain_ckpt:
            raise UserError("--from_scratch and --pretrain_ckpt exclude each other")
        if self.num_processes > 1 and self.device not in (None, [-1]):
            raise UserError("--num_processes is for the CPU: with it, --device may only be -1")
        if Path(self.ckpt).name != self.ckpt or self.ckpt in ("", ".", ".."):
            raise UserError(f"--ckpt {self.ckpt!r}: must be a plain name within --output_dir")


def say(text: object) -> None:
    """Print on the first process."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(text, flush=True)


class Run:
    """One finetuning run: everything that its steps share, and its folder."""

    def __init__(self, args: FinetuneArguments) -> None:
        args.check()
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator, self.devices = choose_devices(args.device)
        if args.num_processes > 1:
            self.accelerator, self.devices = "cpu", args.num_processes
        self.precision = half_precision(self.accelerator) if args.fp16 else "32-true"
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
        seed_everything(args.seed, verbose=False)
        self.model, self.tokenizer = self._load_model()
        self.store = TokenizedItems.open_or_build(
            self.folder.items, self.tokenizer, cache_dir(Path(args.data_path), self.output_dir)
        )
        self.data = SeqRecDataModule(
            self.folder,
            RecformerTrainCollator(self.store, self.model.config),
            RecformerEvalCollator(self.store, self.model.config),
            args.batch_size,
            args.dataloader_num_workers,
            args.eval_users,
            args.seed,
        )
        self._claim_output_dir()
        self.logger = wandb_logger(self.output_dir, "recformer") if args.wandb else None

    def _load_model(self) -> tuple[RecformerForSeqRec, RecformerTokenizer]:
        args = self.args
        overrides = args.overrides() | {
            "item_num": self.folder.num_items,
            "finetune_negative_sample_size": args.finetune_negative_sample_size,
        }
        model, tokenizer, report = load_start_model(
            RecformerForSeqRec,
            args.pretrain_ckpt,
            args.model_name_or_path,
            args.tokenizer_name,
            args.from_scratch,
            overrides,
        )
        say(report)
        if args.fix_word_embedding:
            model.longformer.embeddings.word_embeddings.weight.requires_grad_(False)
        return model, tokenizer

    def _claim_output_dir(self) -> None:
        """Take the output folder, or continue there if it holds this very run.

        Raises:
            UserError: the folder holds another run and may not be overwritten.
        """
        ignored = {"output_dir", "overwrite_output_dir", "wandb", "dataloader_num_workers"}
        ignored |= {"preprocessing_num_workers", "data_path"}  # none of them changes a figure
        settings = {k: v for k, v in asdict(self.args).items() if k not in ignored}
        settings |= {"split_hash": self.folder.split_hash, "items": self.store.key}
        settings |= {"weights": weights_hash(self.model), "precision": self.precision}
        path = self.output_dir / "run.json"
        if path.exists():
            before = read_json(path)
            different = sorted(k for k in settings | before if settings.get(k) != before.get(k))
            if different and not self.args.overwrite_output_dir:
                raise UserError(
                    f"{self.output_dir} holds another run (different: {', '.join(different)}); "
                    "choose another --output_dir, or give --overwrite_output_dir"
                )
            if different:
                for name in ("evaluation", "ranks", *PATIENCE):
                    shutil.rmtree(self.output_dir / name, ignore_errors=True)
                (self.output_dir / "metrics.json").unlink(missing_ok=True)
        write_json(path, settings, indent=1)

    def _module(self) -> LitWrapper:
        args = self.args
        return LitWrapper(
            self.model,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup_steps=args.warmup_steps,
            metric_ks=tuple(args.metric_ks),
            ties=args.ties,
            filter_seen=args.filter_seen,
            seed=args.seed,
        )

    def _trainer(self, callbacks: Sequence[Any]) -> Any:
        args = self.args
        processes = self.devices if isinstance(self.devices, int) else len(self.devices)
        return build_trainer(
            self.output_dir,
            args.num_train_epochs,
            self.accelerator,
            self.devices,
            self.precision,
            callbacks,
            strategy="ddp" if processes > 1 else "auto",
            validate_every=args.verbose,
            accumulate=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            logger=self.logger,
        )

    def evaluate(self, name: str) -> dict[str, dict[str, float]]:
        """Rank all validation and test users with the model as it stands; figures by split.

        Per-user ranks go to `ranks/<name>_<split>.parquet`; figures already on disk are read.
        """
        done = self.output_dir / "evaluation" / f"{name}.json"
        if done.exists():
            return read_json(done)
        module = self._module()
        trainer = self._trainer([ItemTable(self.store, every_epoch=False)])
        figures = {}
        for split, loader in (
            ("val", self.data.val_dataloader()),
            ("test", self.data.test_dataloader()),
        ):
            trainer.test(module, loader, verbose=False)
            figures[split] = module.evaluator.compute()
            if trainer.is_global_zero:
                module.evaluator.write_parquet(
                    self.output_dir / "ranks" / f"{name}_{split}.parquet"
                )
        if trainer.is_global_zero:
            write_json(done, figures, indent=1)
        return figures

    def train(self, stage: str, best_before: float | None) -> dict[str, Any]:
        """Train one stage, or what is left of it, and leave the model at its best epoch.

        Args:
            stage: "stage1" (items anew every epoch) or "stage2" (item table kept).
            best_before: validation metric that an earlier stage reached; only better counts.

        Returns:
            `best` (validation metric or None if never above `best_before`), `rows` (history),
            `seconds`.
        """
        folder = self.output_dir / stage
        done, last, best = folder / "done.json", folder / "last.ckpt", folder / "best.ckpt"
        monitor = f"val/{self.args.metric}"
        if done.exists():
            result = read_json(done)
        else:
            stopper = EarlyStop(
                monitor, patience=PATIENCE[stage], mode="max", check_on_train_epoch_end=False
            )
            keeper = ModelCheckpoint(
                folder, "best", monitor, mode="max", enable_version_counter=False,
                save_on_train_epoch_end=False,
            )  # fmt: skip
            if best_before is not None:
                stopper.best_score = torch.tensor(best_before)
            saver = ModelCheckpoint(
                folder, "last", enable_version_counter=False, save_on_train_epoch_end=True
            )
            history = History(folder, stage, self.args.metric)
            callbacks = [ItemTable(self.store, stage == "stage1"), LastEpochIsValidated()]
            trainer = self._trainer([*callbacks, stopper, history, keeper, saver])
            started = time.monotonic()
            resume = str(last) if last.exists() else None
            if resume:
                say(f"{stage}: continuing from {last}")
            trainer.fit(self._module(), datamodule=self.data, ckpt_path=resume)
            if trainer.interrupted:
                raise KeyboardInterrupt
            score = float(keeper.best_model_score)
            result = {
                "best": score if best_before is None or score > best_before else None,
                "rows": history.rows,
                "seconds": round(time.monotonic() - started, 1),
            }
            if trainer.is_global_zero:
                write_json(done, result, indent=1)
        if result["best"] is not None:
            self._load_best(best)
        return result

    def _load_best(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        self.model.cpu().load_state_dict({k.removeprefix("model."): v for k, v in state.items()})

    def save_best(self) -> None:
        """The model as it stands, its tokenizer, item vectors and item ids as one folder."""
        name = self.args.ckpt
        folder = self.output_dir / (name[:-4] if name.endswith(".bin") else name)
        self.model.cpu().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        smap = {asin: item_id for item_id, asin in enumerate(self.folder.asins)}
        write_json(folder / "smap.json", smap)
        if name.endswith(".bin"):
            with atomic_write(self.output_dir / name, "wb") as handle:
                torch.save(self.model.state_dict(), handle)


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of figures as an aligned text table; MRR at cut-offs is left to `metrics.json`."""
    columns = [c for c in next(iter(rows.values())) if c != "num_users" and "MRR@" not in c]
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name:>11}" for name in columns)]
    for name, figures in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{figures[c]:>11.4f}" for c in columns))
    return "\n".join(lines)


def run(args: FinetuneArguments) -> dict[str, Any]:
    """Finetune and evaluate; returns what `metrics.json` holds."""
    started = time.monotonic()
    this = Run(args)
    metrics_path = this.output_dir / "metrics.json"
    evaluations = {"zero_shot": this.evaluate("zero_shot")}
    stages: dict[str, dict[str, Any]] = {}
    if not args.zero_shot:
        best: float | None = None
        chosen = ["stage1", "stage2"] if args.stages == "both" else [f"stage{args.stages}"]
        for stage in chosen:
            this.model.train()
            stages[stage] = this.train(stage, best)
            if stages[stage]["best"] is not None:
                best = stages[stage]["best"]
                evaluations[stage] = this.evaluate(stage)
            else:
                evaluations[stage] = evaluations["stage1"]
                say(f"{stage} did not improve on {args.metric} {best:.4f}: stage 1's model stays")
    final = list(evaluations)[-1]
    result: dict[str, Any] = {
        "test": evaluations[final]["test"],
        "validation": evaluations[final]["val"],
        "evaluations": evaluations,
        "stages": stages,
        "ties": args.ties,
        "filter_seen": args.filter_seen,
        "split_hash": this.folder.split_hash,
        "eval_users": args.eval_users,
        "seed": args.seed,
        "precision": this.precision,
        "seconds": round(time.monotonic() - started, 1),
    }
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        if not args.zero_shot:
            this.save_best()
            draw_history(
                {stage: entry["rows"] for stage, entry in stages.items()},
                this.output_dir / "curves.png",
                args.metric,
                evaluations["zero_shot"]["val"][args.metric],
            )
        write_json(metrics_path, result, indent=1)
        print(f"\ntest, {result['test']['num_users']:,.0f} users, full ranking, ties {args.ties}, "
              f"seen items {'filtered' if args.filter_seen else 'kept'}")  # fmt: skip
        print(format_table({name: entry["test"] for name, entry in evaluations.items()}))
        print(f"written to {this.output_dir}: metrics.json"
              + ("" if args.zero_shot else f", curves.png, {args.ckpt}"))  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    parser = HfArgumentParser(FinetuneArguments, description=__doc__.split("\n\n")[0])
    (args,) = parser.parse_args_into_dataclasses(argv)
    run(args)


if __name__ == "__main__":
    exit_with_message(main)
