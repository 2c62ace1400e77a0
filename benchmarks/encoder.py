"""The encoder against transformers' `LongformerModel`: same weights, same batches, same dtype.

Two batches: 16 user sequences and 64 single items, of fixed lengths and random token ids. The peer
gets them right-padded, as it must, and pads them on to its window. A forward pass gives the hidden
states of all tokens ("hidden") or the pooled vectors alone ("pooled", for which the peer has no
shorter way). A training step is forward, backward and AdamW on the pooled vectors, with dropout,
under autocast where the dtype is bfloat16.

The share of the ceiling counts operations that the mathematics needs: linear layers over real
tokens, the pairs of tokens that see each other, the projections of `<s>` for `<s>` alone. The
ceiling does them at the speed of the linear layers' products, run one after the other on the same
number of rows and nothing between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LongformerConfig, LongformerModel

from benchmarks.measure import REPEATS, Work, available_gb, give_back, in_turns, row, run_alone
from recformer import PAPER, PackedTokens, RecformerConfig, RecformerModel

# fmt: off
LENGTHS = {
    "sequences": [
        256, 347, 156, 284, 430, 221, 840, 88, 260, 218, 321, 231, 512, 312, 404, 361,
    ],
    "items": [
        41, 49, 31, 18, 50, 44, 35, 38, 44, 65, 60, 23, 49, 43, 67, 36, 32, 34, 33, 42, 38, 37,
        43, 27, 34, 39, 39, 46, 26, 38, 45, 47, 32, 64, 33, 36, 45, 10, 53, 35, 49, 22, 18, 47,
        27, 31, 54, 54, 37, 32, 43, 34, 18, 54, 25, 51, 44, 37, 24, 32, 30, 28, 27, 15,
    ],
}
# fmt: on
SIZES = {
    "base": {"vocab_size": 50265},
    "MiniLM": {
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # so that the kernel takes it
        "intermediate_size": 96,
    },
}
DTYPES = ("float32", "bfloat16")
# Sizes and batches, by `quick`.
CONFIGURATIONS = {
    False: [(size, name) for size in ("base", "MiniLM") for name in LENGTHS],
    True: [("tiny", "items")],
}
PEER = "transformers LongformerModel"
POSITIONS = 1026
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A float32 training step of the peer was seen to take this for every number of the hidden states of
# all layers, padding included. A step that does not fit would take other programs down with it.
PEER_BYTES_A_STATE = 170
LONGEST = 8192


def values_of(size: str, positions: int = POSITIONS) -> dict[str, Any]:
    return {**SIZES[size], "max_position_embeddings": positions}


def build_ours(size: str, positions: int = POSITIONS) -> RecformerModel:
    """Our model, random weights, the two embeddings that the peer has not zero."""
    torch.manual_seed(0)
    ours = RecformerModel(RecformerConfig(**PAPER, **values_of(size, positions)))
    with torch.no_grad():
        ours.embeddings.token_type_embeddings.weight.zero_()
        ours.embeddings.item_position_embeddings.weight.zero_()
    return ours.to(DEVICE)


def build_peer(size: str) -> LongformerModel:
    config = LongformerConfig(**values_of(size), attention_window=PAPER["attention_window"])
    return LongformerModel(config, add_pooling_layer=False).to(DEVICE)


def build(size: str) -> tuple[RecformerModel, LongformerModel]:
    """Both with the same weights."""
    ours, peer = build_ours(size), build_peer(size)
    state = ours.state_dict()
    del state["embeddings.item_position_embeddings.weight"]
    state["embeddings.token_type_embeddings.weight"] = torch.zeros(2, ours.config.hidden_size)
    peer.load_state_dict(state)
    return ours, peer


def pack(lengths: list[int], vocab_size: int) -> PackedTokens:
    """Sequences of these lengths and random token ids."""
    torch.manual_seed(1)
    ids = torch.randint(5, vocab_size, (sum(lengths),))
    zeros = torch.zeros_like(ids)
    return PackedTokens(ids, zeros, zeros, torch.tensor([0, *lengths]).cumsum(0)).to(DEVICE)


def pad(packed: PackedTokens) -> dict[str, Tensor]:
    """The same batch as the peer takes it."""
    mask = packed.to_padded(torch.ones_like(packed.input_ids))
    first = torch.zeros_like(mask)
    first[:, 0] = 1
    return {
        "input_ids": packed.to_padded(packed.input_ids - 1) + 1,
        "attention_mask": mask,
        "global_attention_mask": first,
    }


# --- operations -----------------------------------------------------------------------------------


def operations(config: RecformerConfig, lengths: list[int], pooled: bool) -> float:
    """Floating point operations of a forward pass (a multiplication and an addition are two)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    tokens, sequences = sum(lengths), len(lengths)
    linear = 2 * (4 * hidden**2 + 2 * hidden * inner)  # a token: q, k, v, output, two of the FFN
    # a sequence: q, k and v of `<s>`; a token: its score and its share of the sum, in every head
    first = 6 * hidden**2 * sequences + 4 * hidden * config.num_attention_heads * tokens
    total = 0.0
    for number, window in enumerate(config.layer_windows):
        total += first
        if pooled and number == config.num_hidden_layers - 1:
            total += (linear - 6 * hidden**2) * sequences  # no q, k, v of other tokens
        else:
            total += linear * tokens + 4 * hidden * visible_pairs(lengths, window // 2)
    return total


def visible_pairs(lengths: list[int], half: int) -> int:
    """Pairs (token, token it sees): `half` on either side, and `<s>`."""
    pairs = 0
    for length in lengths:
        reach = min(half, length - 1)
        pairs += length + 2 * sum(length - distance for distance in range(1, reach + 1))
        pairs += max(0, length - 1 - half)  # tokens that see `<s>` from outside its neighbourhood
    return pairs


def products(
    config: RecformerConfig, tokens: int, dtype: torch.dtype
) -> tuple[Callable[[], None], float]:
    """The products of all linear layers over `tokens` rows, and their number of operations."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
    rows = {width: torch.ones(tokens, width, dtype=dtype, device=DEVICE) for width, _ in shapes}
    weights = [  # each layer its own, as in the model
        torch.ones(out, width, dtype=dtype, device=DEVICE)
        for _ in range(config.num_hidden_layers)
        for width, out in shapes
    ]

    def run() -> None:
        for weight in weights:
            F.linear(rows[weight.shape[1]], weight)

    return run, 2.0 * tokens * sum(weight.numel() for weight in weights)


# --- forward --------------------------------------------------------------------------------------


def forward_case(side: str, size: str, dtype: str, lengths: list[int]) -> Work:
    """A forward pass of `side`: hidden, pooled or peer."""
    packed = pack(lengths, SIZES[size]["vocab_size"])
    padded = pad(packed)
    torch.set_default_dtype(getattr(torch, dtype))  # what a conversion leaves would be reused
    try:
        model = (build_peer(size) if side == "peer" else build_ours(size)).eval()
    finally:
        torch.set_default_dtype(torch.float32)

    @torch.no_grad()
    def run() -> None:
        if side == "peer":
            model(**padded)
        elif side == "hidden":
            model.encode_tokens(packed)
        else:
            model.encode(packed)

    return Work(run)


def forward_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Forward passes in both dtypes, and ours in bfloat16 against the peer in float32."""
    for size, name in CONFIGURATIONS[quick]:
        lengths = LENGTHS[name]
        rows, pooled = {}, {}
        for dtype in DTYPES:
            *rows[dtype], pooled[dtype] = _compare_forward(size, dtype, name, lengths)
            yield from rows[dtype]
        cosine = torch.cosine_similarity(pooled["bfloat16"], pooled["float32"], dim=1).min()
        ours, theirs = rows["bfloat16"][0], rows["float32"][0]
        yield row(
            f"{size}, {name}, hidden, ours bfloat16, peer float32",
            ours["ours_seconds"],
            PEER,
            theirs["peer_seconds"],
            amount=sum(lengths),
            unit="tokens",
            note=f"least cosine of our pooled vectors in the two dtypes: {cosine:.6f}",
        )


@torch.no_grad()
def _compare_forward(
    size: str, dtype: str, name: str, lengths: list[int]
) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Rows of hidden and pooled, and our pooled vectors (B, H)."""
    ours, peer = (model.to(getattr(torch, dtype)).eval() for model in build(size))
    packed = pack(lengths, ours.config.vocab_size)
    padded = pad(packed)
    pooled = ours.encode(packed)
    expected = peer(**padded).last_hidden_state * padded["attention_mask"][:, :, None]
    hidden = packed.to_padded(ours.encode_tokens(packed)[0])
    errors = ((hidden - expected).abs().max(), (pooled - expected[:, 0]).abs().max())
    product, product_operations = products(ours.config, packed.num_tokens, pooled.dtype)
    *seconds, peer_seconds, product_seconds = in_turns(
        REPEATS,
        lambda: ours.encode_tokens(packed),
        lambda: ours.encode(packed),
        lambda: peer(**padded),
        product,
    )
    memory = {
        side: run_alone(forward_case, side, size, dtype, lengths)["peak_memory_mb"]
        for side in ("hidden", "pooled", "peer")
    }
    rows = [
        row(
            f"{size}, {name}, {what}, {dtype}",
            ours_seconds,
            PEER,
            peer_seconds,
            amount=packed.num_tokens,
            unit="tokens",
            share_of_ceiling=operations(ours.config, lengths, what == "pooled")
            / ours_seconds
            / (product_operations / product_seconds),
            peak_memory_mb=memory[what],
            peer_peak_memory_mb=memory["peer"],
            note=f"largest difference {error:.1e}",
        )
        for what, ours_seconds, error in zip(("hidden", "pooled"), seconds, errors)
    ]
    return rows[0], rows[1], pooled.float()


# --- training -------------------------------------------------------------------------------------


def training_case(side: str, size: str, dtype: str, lengths: list[int]) -> Work:
    """A training step of `side`, ours or peer; the first one makes AdamW's state."""
    packed = pack(lengths, SIZES[size]["vocab_size"])
    model = build_peer(size) if side == "peer" else build_ours(size)
    return Work(step_of(model, packed, dtype))


def step_of(
    model: RecformerModel | LongformerModel,
    packed: PackedTokens,
    dtype: str,
    learn: bool = True,
    fused: bool = True,
) -> Callable[[], None]:
    """Forward, backward and AdamW; without the latter and without dropout unless `learn`."""
    model.train(learn)
    padded = pad(packed)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)

    def run() -> None:
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            if isinstance(model, RecformerModel):
                pooled = model.encode(packed)
            else:
                pooled = model(**padded).last_hidden_state[:, 0]
        pooled.float()[:, 0].sum().backward()
        if learn:
            adam.step()

    return run


def training_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Training steps in both dtypes."""
    for size, name in CONFIGURATIONS[quick]:
        lengths = LENGTHS[name]
        for dtype in DTYPES:
            yield _compare_training(size, dtype, name, lengths)


def _compare_training(size: str, dtype: str, name: str, lengths: list[int]) -> dict[str, Any]:
    give_back()  # what the row before held
    needed = _peer_training_gb(build_peer(size).config, lengths)
    fits = DEVICE != "cpu" or needed < available_gb() - 2
    memory = [  # first, while this process is small
        run_alone(training_case, side, size, dtype, lengths)["peak_memory_mb"]
        for side in (("ours", "peer") if fits else ("ours",))
    ]
    ours, peer = build(size)
    config = ours.config
    packed = pack(lengths, config.vocab_size)
    product, product_operations = products(config, packed.num_tokens, getattr(torch, dtype))
    if fits:
        note = f"gradients differ by {_gradient_error(ours, peer, packed, dtype):.1e}"
    else:
        note = f"the peer needs about {needed:.0f} GB, more than there is: not run"
    sides = {"ours": step_of(ours, packed, dtype)}
    if fits:
        sides["peer"] = step_of(peer, packed, dtype)
    *seconds, product_seconds = in_turns(REPEATS, *sides.values(), product)
    return row(
        f"{size}, {name}, training step, {dtype}",
        seconds[0],
        PEER if fits else "",
        seconds[1] if fits else None,
        amount=packed.num_tokens,
        unit="tokens",
        # backward are two products for every one forward
        share_of_ceiling=3
        * operations(config, lengths, pooled=True)
        / seconds[0]
        / (product_operations / product_seconds),
        peak_memory_mb=memory[0],
        peer_peak_memory_mb=memory[1] if fits else None,
        note=note,
    )


def _peer_training_gb(config: LongformerConfig, lengths: list[int]) -> float:
    """What a training step of the peer needs, more or less."""
    window = PAPER["attention_window"]
    padded_tokens = -(-max(lengths) // window) * window * len(lengths)
    states = padded_tokens * config.hidden_size * config.num_hidden_layers
    return states * PEER_BYTES_A_STATE / 1e9


def _gradient_error(
    ours: RecformerModel, peer: LongformerModel, packed: PackedTokens, dtype: str
) -> float:
    """How far the gradients of the first query weights are apart without dropout (relative)."""
    grads = []
    for model in (ours, peer):
        step_of(model, packed, dtype, learn=False)()
        grads.append(model.encoder.layer[0].attention.self.query.weight.grad)
        model.zero_grad()
    return float((grads[0] - grads[1]).norm() / grads[1].norm())


# --- lengths --------------------------------------------------------------------------------------


@torch.no_grad()
def length_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """The same number of tokens in sequences of 64 tokens, of 128, … of 8,192."""
    size, total = ("tiny", 1024) if quick else ("MiniLM", LONGEST)
    sizes = [2**power for power in range(6, total.bit_length())]
    for dtype in DTYPES:
        model = build_ours(size, positions=total + 2).to(getattr(torch, dtype)).eval()
        batches = [pack([length] * (total // length), model.config.vocab_size) for length in sizes]
        calls = [partial(model.encode_tokens, batch) for batch in batches]
        times = in_turns(REPEATS, *calls)
        for length, seconds in zip(sizes, times):
            yield row(
                f"{size}, sequences of {length:,}, hidden, {dtype}",
                seconds,
                amount=total,
                unit="tokens",
                note=f"{seconds / times[0]:.2f} x the time in sequences of {sizes[0]}",
            )
