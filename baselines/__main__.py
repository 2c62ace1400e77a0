"""Train and evaluate a baseline on a processed folder, as Recformer is.

`python -m baselines --model sasrec --data_path FOLDER --output_dir DIR`

The same command again continues a run that was cut off, and prints the results of a finished one.
`--config FILE` reads flags from a YAML file (`baselines/configs/`); flags given beside it win.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from lightning import seed_everything
from safetensors.torch import save

from baselines.generative.accuracy import CodeAccuracy, format_code_accuracy
from baselines.models import GENERATE, MODELS, Built, build, settings_of
from baselines.sequence.collators import CausalCollator
from recformer.cli import exit_with_message, flags_parser, keep_freed_memory
from recformer.data.datamodule import SeqRecDataModule
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.protocol import with_protocol
from recformer.evaluation.report import report
from recformer.evaluation.runs import RunResult, StageResult
from recformer.files import UserError, atomic_folder, write_checksums, write_json
from recformer.processes import is_first, say
from recformer.training.arguments import RunArguments, flag
from recformer.training.experiment import Experiment
from recformer.training.history import draw_history
from recformer.training.trainer import Compute


@dataclass
class BaselineArguments(RunArguments):
    """Train and evaluate a baseline on a processed folder by full ranking."""

    model: str = flag("sasrec", "which baseline", choices=list(MODELS))
    output_dir: str = flag("", "everything that is written goes there; unset: result/<model>")
    num_train_epochs: int = flag(200, "epochs at most")
    batch_size: int = flag(128, "users a process and step")
    gradient_accumulation_steps: int = flag(1, "batches an optimizer step")
    learning_rate: float = flag(1e-3, "learning rate of AdamW, constant")
    warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    max_grad_norm: float = flag(0.0, "gradients are clipped to this norm; 0 for no clipping")
    verbose: int = flag(1, "epochs between validations; the last epoch is always validated")
    patience: int = flag(10, "validations without gain before training ends")
    evaluate_only: bool = flag(False, "rank with the weights of --from_published, do not train")
    # A model's own settings; unset, the model's defaults (baselines/models.py) stand.
    hidden_size: int | None = flag(None, "size of item vectors and hidden states (128)")
    num_layers: int | None = flag(None, "transformer layers (2; tiger, gpt2_codes: 4)")
    num_heads: int | None = flag(None, "attention heads (2; tiger: 6 of 64 each; gpt2_codes: 4)")
    dropout: float | None = flag(
        None, "of embeddings, attention and feed-forward layers (0.2; tiger, gpt2_codes: 0.1)"
    )
    max_length: int | None = flag(
        None, "newest items read of a sequence (50; tiger, gpt2_codes: 20)"
    )
    loss: str | None = flag(
        None,
        "softmax, sampled_softmax, bce, gbce, or in_batch: softmax over the batch's targets "
        "(softmax; gsasrec: gbce)",
    )
    num_negatives: int | None = flag(None, "items sampled a prediction, uniformly (256)")
    gbce_t: float | None = flag(None, "calibration t of gBCE, 0 to 1 (0.75)")
    temperature: float | None = flag(None, "scores are divided by it (1)")
    cosine: bool | None = flag(None, "scores are cosines, not dot products")
    hard_negatives: int | None = flag(
        None, "with --loss in_batch: so many of the texts most like the target's are candidates too"
    )
    separate_outputs: bool | None = flag(
        None, "predictions are scored with item vectors of their own (gsasrec: yes)"
    )
    items: str | None = flag(
        None,
        "item vectors: id (learned), frozen (projected text vectors), init (learned, starting as "
        "text vectors), add (learned plus projected text), codes (sums of the vectors of semantic "
        "codes)",
    )
    text_encoder: str | None = flag(
        None,
        "folder or hub id of a sentence encoder, mean-pooled, or of a Recformer; text_neighbours "
        "without it: TF-IDF",
    )
    projection_layers: int | None = flag(None, "linear layers from text to item vectors (2)")
    semantic_ids: str | None = flag(
        None, "tiger, gpt2_codes, --items codes: file of python -m baselines.semantic_ids"
    )
    num_beams: int | None = flag(
        None,
        "tiger, gpt2_codes: items generated for a user, 1 for greedy decoding (50, or the largest "
        "of --metric_ks if that is more)",
    )
    exact_rank: bool | None = flag(
        None, "tiger, gpt2_codes: rank by the scores of all items in place of beam search"
    )
    arch: str | None = flag(None, "transformer, bert4rec: model type of transformers (gpt2, bert)")
    objective: str | None = flag(None, "transformer: causal or masked")
    mask_probability: float | None = flag(None, "masked: share of hidden items (0.2)")
    decay: float | None = flag(
        None,
        "text_neighbours, cooccurrence: weight of an item against the next newer one, 0 for the "
        "last item alone (0.6)",
    )
    weighting: str | None = flag(None, "text_neighbours: of words, tfidf or bm25 (tfidf)")
    history_factor: float | None = flag(
        None,
        "text_neighbours, cooccurrence: scores of items that the user has are multiplied by it, "
        "from 0 to 1 (1)",
    )
    from_published: str | None = flag(
        None, "sasrec, gsasrec: weights of a published gSASRec file to start from"
    )

    def own(self) -> dict[str, Any]:
        """The model's settings that were given."""
        shared = {field.name for field in fields(RunArguments)}
        shared |= {"model", "patience", "evaluate_only"}
        values = {name: value for name, value in asdict(self).items() if name not in shared}
        return {name: value for name, value in values.items() if value is not None}


def run(args: BaselineArguments) -> dict[str, Any]:
    """Train where there is something to train, evaluate, and write; returns `metrics.json`.

    Raises:
        FileNotFoundError, UserError: as `ProcessedFolder.load`, a flag that the model does not
            have, or values that do not go together.
    """
    started = time.monotonic()
    args.output_dir = args.output_dir or f"result/{args.model}"
    if args.patience < 1:
        raise UserError(f"--patience {args.patience}: must be at least 1")
    if args.evaluate_only and not args.from_published:
        raise UserError("--evaluate_only goes with --from_published: else nothing was trained")
    own, generative = args.own(), args.model in GENERATE
    if generative:
        own.setdefault("num_beams", max([MODELS[args.model]["num_beams"], *args.metric_ks]))
    settings = settings_of(args.model, own)
    args.check()
    compute = Compute.of(args)
    if generative and not settings["exact_rank"] and settings["num_beams"] < max(args.metric_ks):
        say(
            f"--num_beams {settings['num_beams']}: no more items are generated for a user, so that "
            f"figures at --metric_ks beyond count these alone; --num_beams {max(args.metric_ks)} "
            "or --exact_rank gives them in full"
        )
    folder = ProcessedFolder.load(args.data_path)
    say(
        f"{args.data_path}: {folder.num_users:,} users, {folder.num_items:,} items, "
        f"split {folder.split_hash[:12]}"
    )
    seed_everything(args.seed, verbose=False)
    built = build(args.model, settings, folder)
    data = SeqRecDataModule(
        folder,
        built.train_collator or CausalCollator(1),
        built.eval_collator,
        args.batch_size,
        args.dataloader_num_workers,
        args.eval_users,
        args.seed,
    )
    experiment = Experiment(
        args,
        compute,
        built.model,
        data,
        asdict(args)
        | settings
        | {"split_hash": folder.split_hash, "semantic_ids_hash": built.semantic_ids_hash},
        ["training"],
        ("best_model", "curves.png"),
        project=args.model,
        schedule="constant",
    )
    trains = built.train_collator is not None and not args.evaluate_only
    leaves = ("curves.png", "best_model") if trains else ()
    result = experiment.finished
    with experiment.folder as output:
        if result is None or not output.has("ranks", *leaves):
            result = train_and_evaluate(experiment, args, settings, built, folder, started)
    if is_first():
        print("\n" + experiment.headline(result.test))
        print(report({args.model: result.test}, args.metric))
        if generative:
            print(format_code_accuracy(result.test["code_accuracy"]))
        written = ", ".join(("metrics.json", "ranks", *leaves))
        print(f"written to {experiment.output_dir}: {written}")
    return result.as_dict()


def train_and_evaluate(
    experiment: Experiment,
    args: BaselineArguments,
    settings: dict[str, Any],
    built: Built,
    folder: ProcessedFolder,
    started: float,
) -> RunResult:
    """What `run` does where nothing is finished; `started` is when, by the monotonic clock."""
    trains = built.train_collator is not None and not args.evaluate_only
    stages: dict[str, StageResult] = {}
    name = "published" if args.evaluate_only else "untrained"
    if trains:
        name = "trained"
        stages["training"] = experiment.train("training", args.patience)
    around = [CodeAccuracy] if args.model in GENERATE else []
    evaluations = {name: experiment.evaluate(name, lambda: [make() for make in around])}
    weights = [p for p in built.model.parameters() if p.requires_grad]
    result = experiment.result(
        evaluations,
        stages,
        model=args.model,
        settings=settings,
        parameters=sum(p.numel() for p in weights),
        train_seconds=float(sum(row["seconds"] for s in stages.values() for row in s.rows)),
        seconds=round(time.monotonic() - started, 1),
    )
    if is_first():
        if trains:
            best_model = experiment.output_dir / "best_model"
            save_best(best_model, built, args.model, settings, folder)
            rows = {stage: entry.rows for stage, entry in stages.items()}
            draw_history(rows, experiment.output_dir / "curves.png", args.metric)
        result.save(experiment.output_dir)
    return result


def save_best(
    path: Path, built: Built, name: str, settings: dict[str, Any], folder: ProcessedFolder
) -> None:
    """The trained model as a folder that `baselines.models.load` reads."""
    # Cloned: tied tensors share their memory, which the format has no room for.
    state = {k: v.detach().cpu().clone().contiguous() for k, v in built.model.state_dict().items()}
    config = {
        "model": name,
        "settings": settings,
        "semantic_ids_hash": built.semantic_ids_hash,
        "asins": folder.asins,
    }
    with atomic_folder(path) as new:
        (new / "model.safetensors").write_bytes(save(state))
        write_json(new / "config.json", config)
        write_checksums(new)


def read_config(path: str) -> dict[str, Any]:
    """Flags of a YAML file, checked.

    Raises:
        FileNotFoundError: no such file.
        UserError: not a YAML mapping, or a name that is no flag.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except RecursionError:
        raise UserError(f"{path} is no YAML of flags: nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, a date of day 99
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of flags to values")
    unknown = sorted(set(values) - {field.name for field in fields(BaselineArguments)})
    if unknown:
        raise UserError(f"{path}: {unknown[0]} is no flag of python -m baselines")
    return values


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    parser = flags_parser("baseline", __doc__, BaselineArguments)
    parser.add_argument("--config", help="YAML file of flags; those given on the line win")
    argv = with_protocol(argv, "evaluation")
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        parser.set_defaults(**read_config(known.config))
    args, _ = parser.parse_args_into_dataclasses(argv)
    keep_freed_memory()
    run(args)


if __name__ == "__main__":
    exit_with_message(main)
