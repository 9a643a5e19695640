"""Steps of the residual as contenders of `benchmarks.attention`, and what a generation of them takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import lite_attention
from benchmarks.peers import Contender
from lite_attention.cute_kernels import launcher
from lite_attention.cute_kernels.config import KernelConfig, Residual, State
from lite_attention.ops import ResidualState, SkipState, residual_attention
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.plan import DECIDING, FULL, SPARSE, step_plan
from lite_attention.ops.targets import target_of
from lite_attention.ops.tiles import ceil_div

KEEPS = (0.2, 0.3)
EVERY = (2, 3, 5)
STEPS = (20, 50)
FORMATS = {"": "none", "INT8 and FP8, ": "int8_fp8"}
NO_VOTE = -60.0
_KINDS = {"full": FULL, "deciding": DECIDING, "sparse": SPARSE}


def in_use(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: float, **options: Any) -> ResidualState:
    """Return a state with a mask in use and two residuals of it."""
    state = ResidualState.for_inputs(q, k, v, plan=[DECIDING, FULL, FULL], keep=keep, slots=1, **options)
    for step in range(3):
        state.set_time(1 - 0.1 * step)
        residual_attention(q, k, v, state, quantization=options.get("quantization", "none"))
    state.set_time(0.65)
    return state


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str, keep: float, **options: Any) -> Contender:
    """One kind of step, again and again; a fresh one is the first of a generation."""
    quantization = options.get("quantization", "none")
    state = in_use(q, k, v, keep, **options)
    state.set_plan([_KINDS.get(kind, DECIDING)])

    def call() -> Any:
        if kind == "fresh":
            state.start_fresh()
        return residual_attention(q, k, v, state, quantization=quantization)

    return call, float(state.sparsity()) if kind == "sparse" else 0.0


def votes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: float, quantization: str = "none") -> Contender:
    """The kernel of votes, with the mask that the residual keeps."""
    kept = in_use(q, k, v, keep, quantization=quantization, residual_dtype="fp8").kept_tiles()
    state = SkipState.for_inputs(q, k, threshold=NO_VOTE, slots=1, quantization=quantization)
    lite_attention.skip_attention(q, k, v, state, quantization=quantization)
    state.skip_mask[0] = pack_bits(~kept[0])
    share = state.sparsity().item()
    return lambda: lite_attention.skip_attention(q, k, v, state, quantization=quantization), share


def choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: float) -> Contender:
    """What a deciding step does once all masses are there."""
    state = in_use(q, k, v, keep)
    config = KernelConfig("bf16", q.shape[3], state.tile_m, state.tile_n, residual="fp8", target=target_of(q.device))
    kernels, tiles = launcher._choice(config), (ceil_div(q.shape[1], state.tile_m), ceil_div(k.shape[1], state.tile_n))
    decision, counts, mass = launcher._scratch(q, *tiles)
    decision[0], masses = 1, torch.randint(1, 2**18, mass.shape, dtype=mass.dtype, device=mass.device)
    none = torch.empty(0, device=q.device)
    kept = Residual(state.plan, state.keep, none, none, None, none, mass, decision)
    of_state = State(state.skip_mask, state.control, None, None, None)

    def call() -> None:
        counts.zero_()
        launcher._choose(kernels, of_state, kept, counts, (q.shape[1], k.shape[1], state.tile_m, state.tile_n))

    mass.copy_(masses)
    return call, 0.0


def contenders(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Yield (name, what makes it ready)."""
    yield "of a deciding step, the choice", partial(choice, q, k, v, KEEPS[0])
    for label, quantization in FORMATS.items():
        options = {"quantization": quantization}
        yield f"{label}votes, nothing skipped", partial(votes, q, k, v, 1.0, quantization)
        for kind in ("full", "deciding", "fresh"):
            yield f"{label}{kind} step", partial(step, q, k, v, kind, KEEPS[0], **options)
        for keep in KEEPS:
            yield f"{label}votes, the mask of keep {keep:.0%}", partial(votes, q, k, v, keep, quantization)
            yield f"{label}sparse step, keep {keep:.0%}", partial(step, q, k, v, "sparse", keep, **options)
    for kind in ("full", "sparse"):
        yield f"{kind} step, keep {KEEPS[0]:.0%}, host", partial(step, q, k, v, kind, KEEPS[0], memory="host")


def generations(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, float]]:
    """Yield (name, share computed, time / FA3 dense of a step in the mean, the same of votes that compute as much)."""
    ratios: dict[str, float] = {row["name"]: row["ratio"] for row in rows}
    for label, keep in itertools.product(FORMATS, KEEPS):
        names = [f"votes, the mask of keep {keep:.0%}", "votes, nothing skipped"]
        names += [f"sparse step, keep {keep:.0%}", "full step", "deciding step", "fresh step"]
        if not {label + name for name in names} <= set(ratios):
            continue
        low, high, *of_kind, fresh = (ratios[label + name] for name in names)
        for steps, every in itertools.product(STEPS, EVERY):
            kinds = step_plan(steps, full_every=every)
            mean = (sum(of_kind[kind] for kind in kinds[1:]) + fresh) / steps
            cost = sum(1.0 if kind != SPARSE else keep for kind in kinds) / steps
            like = low + (high - low) * (cost - keep) / (1 - keep)
            yield f"{label}{steps} steps, keep {keep:.0%}, full every {every}", cost, mean, like
