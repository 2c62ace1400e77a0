"""Pretraining of Recformer: item-item contrast and masked language modelling (paper, section 2.3).

`recformer pretrain --train_file train.json --dev_file dev.json \\
     --item_attr_file meta_data.json --model_name_or_path MODEL --output_dir DIR`

`--output_dir` then holds `start/` (weights, configuration and tokenizer that it started from),
`checkpoints/`, `history.csv`, `curves.png` and `metrics.json`. `recformer convert` turns a
checkpoint into a model for finetuning. The same command again continues a run that was cut off
(`--ckpt last` insists on it), and prints the results of a finished one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything

from recformer.cli import check_seed, exit_with_message, keep_freed_memory, parse_flags
from recformer.data.items import cache_dir
from recformer.data.masking import WholeWordMasker
from recformer.data.pairs import PretrainDataModule
from recformer.data.pretraining import PretrainingData
from recformer.files import (
    UserError,
    atomic_folder,
    read_checked_json,
    write_checked_json,
    write_checksums,
)
from recformer.models import RecformerForPretraining
from recformer.processes import is_first, join, say
from recformer.tokenization import RecformerTokenizer
from recformer.training.arguments import (
    ACTIVATION_CHECKPOINTING,
    ModelArguments,
    check_nodes,
    flag,
)
from recformer.training.callbacks import EarlyStop
from recformer.training.history import StepHistory, plot_steps
from recformer.training.pretraining import PretrainModule
from recformer.training.run_folder import RunFolder, checked
from recformer.training.seeds import run_seeds, write_summary
from recformer.training.start import (
    keep_no_activations,
    load_start_model,
    start_tokenizer,
    weights_hash,
)
from recformer.training.strategies import STRATEGIES, build_strategy, newest_whole
from recformer.training.trainer import (
    Keeper,
    build_trainer,
    half_precision,
    wandb_logger,
    whole_group,
)

MONITOR = "val/accuracy"  # published: the best checkpoints are those of the best accuracy
METRIC = "Recall@10"
ABLATIONS = ("mlm", "contrast", "item_positions")
# In the output folder, beside run.json.
WRITTEN = ("checkpoints", "start", "history.csv", "curves.png", "metrics.json")


@dataclass
class PretrainArguments(ModelArguments):
    """Pretrain Recformer on item sequences of many categories."""

    train_file: str = flag("pretrain_data/train.json", "sequences to train on")
    dev_file: str = flag("pretrain_data/dev.json", "sequences of the held-out category")
    item_attr_file: str = flag(
        "pretrain_data/meta_data.json", "attributes of all items: {asin: {attribute: text}}"
    )
    output_dir: str = flag("result/recformer_pretraining", "folder for all output")
    model_name_or_path: str = flag(
        "allenai/longformer-base-4096",
        "folder or hub id of the language model: configuration and tokenizer, and start weights "
        "where --longformer_ckpt is not set (Longformer, RoBERTa or BERT family, or a Recformer)",
    )
    longformer_ckpt: str | None = flag(
        None,
        "start weights that `recformer start-weights` wrote; unset: those of the language model",
    )
    tokenizer_name: str | None = flag(
        None, "folder or hub id of the tokenizer, where it is not with --model_name_or_path"
    )
    from_scratch: bool = flag(False, "random weights instead of a language model's")
    ckpt: str | None = flag(
        None,
        "checkpoint to go on from: 'last' for the newest one of --output_dir, or the path of one; "
        "unset: the newest one, if --output_dir holds this very run",
    )
    num_train_epochs: int = flag(10, "epochs to train")
    batch_size: int = flag(2, "pairs in a batch of one process, in validation too")
    max_tokens_per_batch: int | None = flag(
        None,
        "train on batches of about so many tokens a process instead of --batch_size pairs, pairs "
        "of similar length together (both sides count, masked copies do not)",
    )
    grad_cache: int | None = flag(
        None,
        "send so many pairs of a batch through the encoder at a time, and again for the gradients: "
        "batches of thousands of pairs, all negatives of each other, in the memory of so many "
        "(gradient caching, Gao et al. 2021), at about 1.3 times the time",
    )
    activation_checkpointing: bool = flag(False, ACTIVATION_CHECKPOINTING)
    gradient_accumulation_steps: int = flag(8, "batches per optimizer step")
    learning_rate: float = flag(5e-5, "peak learning rate of AdamW")
    weight_decay: float = flag(0.0, "weight decay of AdamW; none on biases and LayerNorm")
    warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 for no clipping")
    mlm_probability: float = flag(0.15, "share of masked tokens, in whole words")
    mlm_weight: float | None = flag(
        None,
        "weight of either MLM loss beside the contrastive one; unset: the configuration's (0.1)",
    )
    fix_word_embedding: bool = flag(False, "do not train the word embeddings")
    ablation: str | None = flag(
        None,
        "leave something out: mlm (contrastive loss alone), contrast (MLM alone), item_positions",
        choices=list(ABLATIONS),
    )
    valid_step: int = flag(2000, "batches between validations; at least one an epoch")
    log_step: int = flag(100, "batches between rows of history.csv")
    save_top_k: int = flag(5, "checkpoints kept, the best by validation accuracy, beside the last")
    patience: int = flag(0, "stop after so many validations without better accuracy; 0: never")
    device: int = flag(1, "number of GPUs; without a GPU, of processes on the CPU (gloo)")
    num_nodes: int | None = flag(
        None,
        "machines that the command is started on, each with --device GPUs or processes; unset: as "
        "many as torchrun, srun or Kubeflow say, else 1",
    )
    strategy: str = flag(
        "auto",
        "how processes share the work; deepspeed_stage_2 also runs on the CPU",
        choices=list(STRATEGIES),
    )
    fp16: bool = flag(
        False, "16-bit mixed precision: bfloat16 where the hardware has it, else float16 on a GPU"
    )
    dataloader_num_workers: int = flag(2, "loader processes")
    preprocessing_num_workers: int = flag(8, "threads of the tokenizer")
    seed: int = flag(42, "seed of weights, order, targets, masks and dropout")
    seeds: list[int] | None = flag(
        None, "in place of --seed: a run each in OUTPUT_DIR/seed_N, and their mean and deviation"
    )
    overwrite_output_dir: bool = flag(False, "start anew where --output_dir holds another run")
    wandb: bool = flag(False, "log to Weights & Biases too (offline without an account)")

    def check(self) -> None:
        """Refuse values that would only fail later.

        Raises:
            UserError: names the flag, its value and what is allowed.
        """
        at_least = {
            "num_train_epochs": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "valid_step": 1,
            "log_step": 1,
            "save_top_k": 1,
            "device": 1,
            "preprocessing_num_workers": 1,
            "dataloader_num_workers": 0,
            "patience": 0,
            "grad_cache": 1,
            "weight_decay": 0,
            "warmup_steps": 0,
            "max_grad_norm": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= least:  # nor NaN
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        check_seed(self.seed)
        if not self.learning_rate > 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be above 0")
        if not 0 < self.mlm_probability <= 1:
            raise UserError(f"--mlm_probability {self.mlm_probability}: must be in (0, 1]")
        if self.mlm_weight is not None and not self.mlm_weight > 0:
            raise UserError(
                f"--mlm_weight {self.mlm_weight}: must be above 0; --ablation mlm leaves MLM out"
            )
        if self.from_scratch and self.longformer_ckpt:
            raise UserError("--from_scratch and --longformer_ckpt exclude each other")
        check_nodes(self.num_nodes)
        if torch.cuda.is_available() and self.device > torch.cuda.device_count():
            raise UserError(
                f"--device {self.device}: this machine has {torch.cuda.device_count()} GPUs"
            )


class Run:
    """One pretraining run: its data, model and folder."""

    def __init__(self, args: PretrainArguments) -> None:
        args.check()
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = half_precision(self.accelerator) if args.fp16 else "32-true"
        os.environ.setdefault("RAYON_NUM_THREADS", str(args.preprocessing_num_workers))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        cuda = self.accelerator == "cuda"
        group = join(args.device, cuda, args.num_nodes, "set --device to {}")
        self.world = group.world
        if self.world == 1 and args.batch_size < 2:  # other processes' targets are negatives
            raise UserError(f"--batch_size {args.batch_size}: must be at least 2")
        self._resume = self._find_checkpoint()
        self.strategy = build_strategy(args.strategy, self.accelerator, self.world)

        seed_everything(args.seed, verbose=False)
        # Data before weights: what is wrong with it shows in seconds.
        self.data = self._load_data()
        self.model, self.tokenizer = self._load_model()
        config = self.model.config
        if args.max_tokens_per_batch is not None:
            least = 4 * config.max_token_num
            if args.max_tokens_per_batch < least:
                raise UserError(
                    f"--max_tokens_per_batch {args.max_tokens_per_batch}: two pairs of the longest "
                    f"sequences must fit, at least {least}"
                )
        masker = None
        if args.ablation != "mlm":
            names = self.data.attribute_names
            masker = WholeWordMasker(self.tokenizer, args.mlm_probability, names)
        self.loaders = PretrainDataModule(
            self.data,
            config,
            masker,
            args.batch_size,
            args.max_tokens_per_batch,
            args.dataloader_num_workers,
            args.seed,
        )
        for split, sampler in self.loaders.samplers.items():
            if sampler.num_batches(self.world) == 0:
                nodes = f" on each of {group.nodes} nodes" if group.nodes > 1 else ""
                raise UserError(
                    f"--device {args.device}{nodes}: the {split} file has {len(sampler.sequences)} "
                    "sequences of two items or more, at least one a process is needed"
                )
        self.folder = self._claim_output_dir()
        self.logger = wandb_logger(self.output_dir, "recformer-pretraining") if args.wandb else None

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.args.ckpt is None:
            return None
        if self.args.ckpt != "last":
            path = Path(self.args.ckpt)
            if not path.exists():
                raise FileNotFoundError(f"--ckpt {path} does not exist")
            return path
        path = self.output_dir / "checkpoints" / "last.ckpt"
        whole = newest_whole(path)
        if whole is None:
            raise FileNotFoundError(f"--ckpt last: no {path}; leave --ckpt out to begin")
        return whole

    def _load_data(self) -> PretrainingData:
        args = self.args
        tokenizer = start_tokenizer(
            args.longformer_ckpt,
            args.model_name_or_path,
            args.tokenizer_name,
            args.from_scratch,
            args.overrides(),
        )
        data = PretrainingData.open_or_build(
            args.train_file,
            args.dev_file,
            args.item_attr_file,
            tokenizer,
            cache_dir(Path(args.train_file).parent, self.output_dir),
        )
        counts = data.counts
        for split in ("train", "dev"):
            line = f"{split}: {counts[f'{split}_sequences']:,} sequences, "
            line += f"{counts[f'{split}_interactions']:,} interactions"
            if counts[f"{split}_left_out"]:
                line += f" ({counts[f'{split}_left_out']:,} sequences of one item left out)"
            say(line)
        say(f"{len(data.store):,} items of {data.store.lengths.mean():.1f} tokens")
        return data

    def _load_model(self) -> tuple[RecformerForPretraining, RecformerTokenizer]:
        args = self.args
        overrides = args.overrides()
        if args.mlm_weight is not None:
            overrides["mlm_weight"] = args.mlm_weight
        model, tokenizer, report = load_start_model(
            RecformerForPretraining,
            args.longformer_ckpt,
            args.model_name_or_path,
            args.tokenizer_name,
            args.from_scratch,
            overrides,
        )
        say(report)
        embeddings = model.longformer.embeddings
        if args.activation_checkpointing:
            keep_no_activations(model.longformer)
        if args.fix_word_embedding:
            embeddings.word_embeddings.weight.requires_grad_(False)
        if args.ablation == "mlm":
            model.lm_head.requires_grad_(False)
        if args.ablation == "item_positions":
            torch.nn.init.zeros_(embeddings.item_position_embeddings.weight)
            embeddings.item_position_embeddings.weight.requires_grad_(False)
        return model, tokenizer

    def _claim_output_dir(self) -> RunFolder:
        """Take the output folder, or go on in it if it holds this very run.

        Raises:
            UserError: it holds another run, which may not be overwritten.
        """
        args = self.args
        ignored = {"ckpt", "train_file", "dev_file", "item_attr_file"}
        settings = {k: v for k, v in asdict(args).items() if k not in ignored}
        settings |= {"data": self.data.key, "weights": weights_hash(self.model)}
        settings |= {"precision": self.precision, "accelerator": self.accelerator}
        if args.ckpt and args.overwrite_output_dir:
            raise UserError(
                "--ckpt goes on with a run and --overwrite_output_dir begins anew, give one of them"
            )
        folder = RunFolder.claim(self.output_dir, settings, WRITTEN, args.overwrite_output_dir)
        last = newest_whole(self.output_dir / "checkpoints" / "last.ckpt")
        self._resume = self._resume or last
        if is_first() and last is None:
            # What conversion needs: configuration, tokenizer, and weights that stay frozen.
            with atomic_folder(self.output_dir / "start") as start:
                self.model.save_pretrained(start)
                self.tokenizer.save_pretrained(start)
                write_checksums(start)
        return folder

    def _batches_between_validations(self) -> int:
        """`--valid_step`, made to fit the epoch.

        An epoch has equal intervals, at least one. They hold whole optimizer steps, as a checkpoint
        has no accumulated gradients; the few batches beyond the last one are left out of the epoch,
        for no validation or checkpoint would hold what they taught.
        """
        batches = self.loaders.samplers["train"].num_batches(self.world)
        intervals = max(1, round(batches / self.args.valid_step))
        steps = batches // intervals // self.args.gradient_accumulation_steps
        if intervals == 1 or steps == 0:
            return batches
        return steps * self.args.gradient_accumulation_steps

    def train(self) -> dict[str, Any]:
        """Train, or go on; returns what `metrics.json` holds.

        Raises:
            UserError: a checkpoint or result to go on from is damaged.
        """
        with self.folder:
            return self._train()

    def _train(self) -> dict[str, Any]:
        args, metrics = self.args, self.output_dir / "metrics.json"
        if self.folder.has("metrics.json"):
            finished = read_checked_json(metrics)
            if not {"best", "last", "best_checkpoint"} <= set(finished):
                raise UserError(f"{metrics} is not of a pretraining")
            self._report(finished)
            return finished
        started = time.monotonic()
        module = PretrainModule(
            self.model,
            self.data.store,
            self.loaders.pool,
            contrast=args.ablation != "contrast",
            grad_cache=args.grad_cache,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup_steps=args.warmup_steps,
            metric_ks=(10, 50),
            seed=args.seed,
        )
        interval = self._batches_between_validations()
        batches = self.loaders.samplers["train"].num_batches(self.world)
        history = StepHistory(self.output_dir / "history.csv", args.log_step, METRIC)
        checkpoints = self.output_dir / "checkpoints"
        keeper = Keeper(
            checkpoints,
            "step={step}",
            MONITOR,
            save_top_k=args.save_top_k,
            save_on_train_epoch_end=False,
        )
        # At every validation, also where it is not among the best.
        saver = Keeper(checkpoints, "last", save_on_train_epoch_end=False)
        callbacks: list[Any] = [history]
        if args.patience:
            callbacks.append(EarlyStop(MONITOR, patience=args.patience, mode="max"))
        trainer = build_trainer(
            self.output_dir,
            args.num_train_epochs,
            self.accelerator,
            args.device,
            self.precision,
            [*callbacks, keeper, saver],
            strategy=self.strategy,
            validate_every_batches=interval,
            accumulate=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            logger=self.logger,
        )
        trainer.limit_train_batches = batches // interval * interval
        if self._resume:
            checked(self._resume)
            say(f"going on from {self._resume}")
        with whole_group(trainer):
            trainer.fit(module, datamodule=self.loaders, ckpt_path=self._resume)
        validations = [row for row in history.rows if MONITOR in row]
        best = max(validations, key=lambda row: row[MONITOR])
        result = {
            "best": best,
            "last": validations[-1],
            "best_checkpoint": Path(keeper.best_model_path).name,
            "seconds": round(time.monotonic() - started, 1),
            "precision": self.precision,
            "processes": self.world,
            "seed": args.seed,
        }
        if is_first():
            plot_steps(history.rows, self.output_dir / "curves.png", METRIC)
            write_checked_json(metrics, result)
            self._report(result)
        return result

    def _report(self, result: dict[str, Any]) -> None:
        if not is_first():
            return
        best = result["best"]
        print(
            f"best validation accuracy {best[MONITOR]:.4f} at step {best['step']}; in "
            f"{self.output_dir}: checkpoints, history.csv, curves.png, metrics.json"
        )
        checkpoint = self.output_dir / "checkpoints" / result["best_checkpoint"]
        print(f"next: recformer convert --checkpoint {checkpoint}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    args = parse_flags("pretrain", __doc__, PretrainArguments, argv)
    if args.seeds is not None:
        folders = run_seeds("pretrain", argv, args.output_dir, args.num_nodes)
        if not is_first():
            return
        results = [read_checked_json(folder / "metrics.json") for folder in folders]
        seeds, best = [r["seed"] for r in results], [r["best"] for r in results]
        write_summary(seeds, best, args.output_dir, "best validation")
        return
    keep_freed_memory()
    Run(args).train()


if __name__ == "__main__":
    exit_with_message(main)
