"""Steps of the residual as contenders of `attention` and `portable`, and what a generation of them takes.

    python -m benchmarks.residual_steps [--shapes 1,40,75600,128 ...] [--seconds 0.3] [--quantizations none int8_fp8]

By itself it prints what deciding and fresh steps take more than full ones, three times, each in a block of its own
between two of full steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measure import begin, going_on, parser_of_calls
from benchmarks.peers import Contender
from lite_attention.cli.planted import planted, skipping
from lite_attention.cli.timing import block
from lite_attention.cute_kernels import launcher
from lite_attention.cute_kernels.config import KernelConfig, Residual, State
from lite_attention.ops import ResidualState, residual_attention
from lite_attention.ops.plan import DECIDING, FULL, SPARSE, step_plan
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.targets import target_of
from lite_attention.ops.tiles import ceil_div

SHAPES = [(1, 40, 75600, 128), (1, 40, 32760, 128)]
KEEPS = (0.2, 0.3)
EVERY = (2, 3, 5)
STEPS = (20, 50)
FORMATS = {"": "none", "INT8 and FP8, ": "int8_fp8"}
_KINDS = {"full": FULL, "deciding": DECIDING, "sparse": SPARSE}


def in_use(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: float, how: Mapping[str, Any], **options: Any
) -> ResidualState:
    """Return a state with a mask in use and two residuals of it.

    Args:
        q: (batch, seq_q, heads, head_dim).
        k: (batch, seq_k, kv_heads, head_dim).
        v: likewise.
        keep: the share of tiles that the mask keeps.
        how: `quantization` and `implementation`, as `residual_attention` takes them.
        options: others of the state.
    """
    state = ResidualState.for_inputs(q, k, v, plan=[DECIDING, FULL, FULL], keep=keep, slots=1, **how, **options)
    for step in range(3):
        state.set_time(1 - 0.1 * step)
        residual_attention(q, k, v, state, **how)
    state.set_time(0.65)
    return state


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str, keep: float, how: Mapping[str, Any], **options: Any
) -> Contender:
    """One kind of step, again and again; a fresh one is the first of a generation."""
    state = in_use(q, k, v, keep, how, **options)
    state.set_plan([_KINDS.get(kind, DECIDING)])

    def call() -> Any:
        if kind == "fresh":
            state.start_fresh()
        return residual_attention(q, k, v, state, **how)

    return call, float(state.sparsity()) if kind == "sparse" else 0.0


def votes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: float, how: Mapping[str, Any]) -> Contender:
    """The kernel of votes, with the mask that the residual keeps."""
    kept = in_use(q, k, v, keep, how, residual_dtype="fp8").kept_tiles()[0]
    return skipping(q, k, v, planted(q, k, v, lambda *_: ~kept, **how), **how)


def choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: float) -> Contender:
    """What a deciding step does once all masses are there."""
    state = in_use(q, k, v, keep, {})
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


def steps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Yield (name, what makes it ready) of each kind of step, and of votes on the same masks."""
    yield "votes, nothing skipped", partial(votes, q, k, v, 1.0, how)
    for kind in ("full", "deciding", "fresh"):
        yield f"{kind} step", partial(step, q, k, v, kind, KEEPS[0], how)
    for keep in KEEPS:
        yield f"votes, the mask of keep {keep:.0%}", partial(votes, q, k, v, keep, how)
        yield f"sparse step, keep {keep:.0%}", partial(step, q, k, v, "sparse", keep, how)


def contenders(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Yield (name, what makes it ready)."""
    yield "of a deciding step, the choice", partial(choice, q, k, v, KEEPS[0])
    for label, quantization in FORMATS.items():
        for name, make in steps(q, k, v, quantization=quantization):
            yield label + name, make
    for kind in ("full", "sparse"):
        yield f"{kind} step, keep {KEEPS[0]:.0%}, host", partial(step, q, k, v, kind, KEEPS[0], {}, memory="host")


def generations(
    ratios: Mapping[str, float], labels: Collection[str] = FORMATS
) -> Iterator[tuple[str, float, float, float]]:
    """Yield (name, share computed, time of a step in the mean, the same of votes that compute as much).

    Args:
        ratios: time of each contender, by its name, over anything.
        labels: what stands before the names of `steps`.
    """
    for label, keep in itertools.product(labels, KEEPS):
        names = [f"votes, the mask of keep {keep:.0%}", "votes, nothing skipped"]
        names += [f"sparse step, keep {keep:.0%}", "full step", "deciding step", "fresh step"]
        if not {label + name for name in names} <= set(ratios):
            continue
        low, high, *of_kind, fresh = (ratios[label + name] for name in names)
        for num_steps, every in itertools.product(STEPS, EVERY):
            kinds = step_plan(num_steps, full_every=every)
            mean = (sum(of_kind[kind] for kind in kinds[1:]) + fresh) / num_steps
            cost = sum(1.0 if kind != SPARSE else keep for kind in kinds) / num_steps
            like = low + (high - low) * (cost - keep) / (1 - keep)
            yield f"{label}{num_steps} steps, keep {keep:.0%}, full every {every}", cost, mean, like


def measure_shape(sizes: Sequence[int], quantization: str, seconds: float) -> None:
    """Time deciding and fresh steps beside full ones at one shape, and print a line each."""
    batch, heads, seq, dim = sizes
    q, k, v = (torch.randn(batch, seq, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    how = {"quantization": quantization}
    full, _ = step(q, k, v, "full", KEEPS[0], how)
    for kind in ("deciding", "fresh"):
        call, _ = step(q, k, v, kind, KEEPS[0], how)
        ratios = []
        for _ in range(3):
            before, ours, after = (block(x, seconds) for x in (full, call, full))
            ratios.append(2 * ours / (before + after))
        print(f"{sizes} {quantization}: {kind} / full step", *(f"{ratio:.3f}" for ratio in ratios), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_calls(__doc__, SHAPES, 0.3)
    parser.add_argument("--quantizations", nargs="+", choices=QUANTIZATIONS, default=["none"])
    args = parser.parse_args(arguments)
    begin()
    for sizes, quantization in itertools.product(args.shapes, args.quantizations):
        with going_on(f"shape {sizes}"):
            measure_shape(sizes, quantization, args.seconds)


if __name__ == "__main__":
    main()
