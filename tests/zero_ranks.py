"""Trains two ZeRO-2 ranks on the CPU and leaves checkpoints; run by test_conversion.py.

`python tests/zero_ranks.py START OUTPUT RANK PORT`: START is a Recformer folder, whose word
embeddings are frozen. OUTPUT gets three DeepSpeed folders, and from rank 0 what they must become:

    float32.ckpt   with the frozen parameters
    bfloat16.ckpt  with the frozen parameters, in bfloat16
    thin.ckpt      the same run without them
    trained.pt     the trained parameters of either run, and outputs of the first
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

START, OUTPUT, RANK, PORT = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(
    DS_ACCELERATOR="cpu",
    RANK=str(RANK),
    LOCAL_RANK=str(RANK),
    WORLD_SIZE="2",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT=PORT,
)

import deepspeed  # noqa: E402
import torch  # noqa: E402

from recformer.models import RecformerForPretraining  # noqa: E402
from recformer.packing import PackedTokens  # noqa: E402

# Otherwise DeepSpeed compiles a C++ extension for collectives within a machine.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def sequences(length: int, seed: int) -> PackedTokens:
    """Two sequences of `length` random tokens each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (2 * length,), generator=generator)
    kinds = torch.ones(2 * length, dtype=torch.long)
    return PackedTokens(ids, kinds, kinds, torch.tensor([0, length, 2 * length]))


class Job(torch.nn.Module):
    """The model under the name that it has within a Lightning module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = RecformerForPretraining.from_pretrained(START).train()
        self.model.longformer.embeddings.word_embeddings.weight.requires_grad_(False)

    def forward(self, a: PackedTokens, b: PackedTokens) -> torch.Tensor:
        return self.model.forward_packed(a, b, (a.input_ids,) * 2, (b.input_ids,) * 2).loss


def train(bfloat16: bool) -> tuple[Job, deepspeed.DeepSpeedEngine]:
    torch.manual_seed(0)
    job = Job()
    trained = [parameter for parameter in job.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bfloat16},
    }
    engine, *_ = deepspeed.initialize(
        model=job,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        config=config,
    )
    for step in range(2):
        engine.backward(engine(sequences(6, 10 * RANK + step), sequences(4, 20 * RANK + step)))
        engine.step()
    return job, engine


deepspeed.init_distributed("gloo")
job, engine = train(bfloat16=False)
run = {"epoch": 1, "global_step": 2}
engine.save_checkpoint(str(OUTPUT / "float32.ckpt"), tag="checkpoint", client_state=run)
job.eval()
with torch.no_grad():
    result = {
        "float32": {key: value.clone() for key, value in job.model.state_dict().items()},
        "scores": job.model.lm_head(job.model.longformer.encode_tokens(sequences(4, 2))[0]),
        "vectors": job.model.longformer.encode(sequences(6, 1)),
    }
job, engine = train(bfloat16=True)
for name, thin in (("bfloat16", False), ("thin", True)):
    engine.save_checkpoint(
        str(OUTPUT / f"{name}.ckpt"), tag="checkpoint", exclude_frozen_parameters=thin
    )
result["bfloat16"] = {key: value.clone() for key, value in job.model.state_dict().items()}
if RANK == 0:
    torch.save(result, OUTPUT / "trained.pt")
