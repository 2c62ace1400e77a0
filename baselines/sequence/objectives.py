"""Objectives of sequence models and the architectures that they fit: one table.

    clm  causal: the next item from those before it (Radford et al., 2018; SASRec)
    mlm  masked: hidden items from both sides (Devlin et al., 2019; BERT4Rec, section 3.6)
    plm  permuted: hidden spans item by item in a random order, each from the rest and from what
         came before it in that order (XLNet: Yang et al., 2019, sections 2.2 and 2.3)
    rtd  replaced: as mlm; what the model puts in for hidden items is then read by a discriminator
         that says of every item whether it was replaced (ELECTRA: Clark et al., 2020)

Transformers4Rec (de Souza Pereira Moreira et al., RecSys 2021) calls them by the same names.
"""

from __future__ import annotations

from recformer.files import UserError

OBJECTIVES = ("clm", "mlm", "plm", "rtd")
EARLIER_NAMES = {"causal": "clm", "masked": "mlm"}

#: What goes with what. Of an architecture that is not here a forward pass shows which way it looks:
#: if back only, clm is possible; if both ways, mlm and rtd.
OBJECTIVES_OF: dict[str, tuple[str, ...]] = {
    "gpt2": ("clm",),
    "llama": ("clm",),
    "bert": ("clm", "mlm", "rtd"),
    "electra": ("clm", "mlm", "rtd"),
    "albert": ("mlm", "rtd"),
    "modernbert": ("mlm", "rtd"),
    "xlnet": ("clm", "mlm", "plm", "rtd"),
}


def objective_named(name: str, flag: str = "--objective") -> str:
    """The objective of this name, or of its earlier one.

    Raises:
        UserError: there is none.
    """
    objective = EARLIER_NAMES.get(name, name)
    if objective not in OBJECTIVES:
        earlier = ", ".join(f"{old} for {new}" for old, new in EARLIER_NAMES.items())
        raise UserError(f"{flag} {name}: expected one of {', '.join(OBJECTIVES)} ({earlier})")
    return objective


def check_goes_with(arch: str, objective: str) -> None:
    """Refuse an objective that the table does not have for an architecture.

    Raises:
        UserError: it names what is possible.
    """
    possible = OBJECTIVES_OF.get(arch)
    if possible is None and objective == "plm":
        possible = ("clm", "mlm", "rtd")
    if possible is None or objective in possible:
        return
    others = [name for name, objectives in OBJECTIVES_OF.items() if objective in objectives]
    raise UserError(
        f"--arch {arch} does not go with --objective {objective}, but with "
        f"{' or '.join(possible)}; --objective {objective} goes with --arch {', '.join(others)}"
    )
