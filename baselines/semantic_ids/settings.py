"""Settings of a quantiser; defaults, checks and the flags of `recformer semantic-ids` follow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from recformer.cli import check_seed
from recformer.files import UserError
from recformer.training.arguments import flag


@dataclass(frozen=True)
class QuantiserSettings:
    """Settings of a new quantiser and of the ids that it gives.

    Raises:
        UserError: a value that is not allowed; named as its flag.
    """

    method: str = flag(
        "rqvae",
        "rqvae: residual-quantised VAE; rkmeans: residual k-means, which trains nothing",
        choices=["rqvae", "rkmeans"],
    )
    levels: int = flag(3, "codes of an item")
    codebook_size: int = flag(256, "codes to choose from at each level")
    collisions: str = flag(
        "level",
        "items of the same codes: level adds a code that tells them apart, reassign moves all but "
        "one to the nearest free code",
        choices=["level", "reassign"],
    )
    commitment: float = flag(
        0.25, "rqvae: weight of the loss that holds latents to their code vectors"
    )
    seed: int = flag(0, "seed of weights, k-means and batches")

    def __post_init__(self) -> None:
        for name, least in (("levels", 1), ("codebook_size", 2), ("commitment", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        check_seed(self.seed)


def optional_flags() -> list[tuple[str, Any, Any]]:
    """A flag for every setting, (name, type, field), None where it is not given."""
    types = get_type_hints(QuantiserSettings)
    return [
        (
            field.name,
            types[field.name] | None,
            flag(
                None,
                f"{field.metadata['help']} (default: {field.default})",
                **{k: v for k, v in field.metadata.items() if k != "help"},
            ),
        )
        for field in fields(QuantiserSettings)
    ]
