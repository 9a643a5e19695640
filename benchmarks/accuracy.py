"""What 8 bits cost in the output of attention, on a CPU, against float64: signal over noise, dB.

    python -m benchmarks.accuracy [--tokens 8192] [--head-dim 128] [--queries 256]

    int8            INT8 scores, exponentials
    int8, as read   the same without taking the mean off the keys
    int8, bits      INT8 scores, and weights from the bits of integers, as Hopper's kernel makes them
    int8_fp8        INT8 scores, weights and values in FP8, exponentials

Data: normal; with scores that deviate by 2 and 4 nats; with channels of K far from zero; with a few outlying channels
of K; beside a sink, a first key whose score is 6 or 12 nats above.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lite_attention.cli.arguments import integer
from lite_attention.ops.dequantize import dequantized, round_weights_
from lite_attention.ops.quantize import QUERY_ROWS, each_row, quantize_key, quantize_query
from lite_attention.tables import text_table

TILE = 80
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v: [1, S, 1, D] float32


def normal(queries: int, tokens: int, dim: int, deviation: float = 1.0) -> Inputs:
    """Scores deviate by this many nats."""
    q, k, v = (torch.randn(1, n, 1, dim) for n in (queries, tokens, tokens))
    return q * deviation, k, v


def far_from_zero(queries: int, tokens: int, dim: int) -> Inputs:
    q, k, v = normal(queries, tokens, dim)
    k[..., ::8] += 20
    return q, k, v


def outlying_channels(queries: int, tokens: int, dim: int) -> Inputs:
    q, k, v = normal(queries, tokens, dim)
    k[..., ::32] *= 10
    return q, k, v


def beside_a_sink(queries: int, tokens: int, dim: int, nats: float) -> Inputs:
    """The first key is along what all queries share."""
    q, k, v = normal(queries, tokens, dim)
    shared = torch.nn.functional.normalize(torch.randn(dim), dim=0)
    q += shared * dim**0.25
    k[:, 0] = shared * nats * dim**0.25
    return q, k, v


DATA: dict[str, Callable[[int, int, int], Inputs]] = {
    "normal": normal,
    "2 nats": partial(normal, deviation=2.0),
    "4 nats": partial(normal, deviation=4.0),
    "channels far from zero": far_from_zero,
    "outlying channels": outlying_channels,
    "a sink of 6 nats": partial(beside_a_sink, nats=6.0),
    "a sink of 12 nats": partial(beside_a_sink, nats=12.0),
}


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return attention in float64, [S, D]."""
    q, k, v = (x[0, :, 0].double() for x in (q, k, v))
    out: torch.Tensor = (q @ k.T * q.shape[1] ** -0.5).softmax(-1) @ v
    return out


def weights_of_bits(scores: torch.Tensor) -> torch.Tensor:
    """Return the powers of two whose bits are linear between integers: at most 6 % more than the true ones."""
    whole = scores.floor()
    return torch.exp2(whole) * (1 + scores - whole)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bits: bool = False, fp8: bool = False) -> torch.Tensor:
    """Return attention of what is seen; the product of q and k is in log2 units."""
    q, k, v = (x[0, :, 0].double() for x in (q, k, v))
    scores = q @ k.T
    scores = scores - scores.amax(-1, keepdim=True)
    weights = weights_of_bits(scores) if bits else torch.exp2(scores)
    if fp8:
        weights = weights.float()
        round_weights_(weights, torch.float8_e4m3fn)
    weights = weights.double()
    return weights @ v / weights.sum(-1, keepdim=True)


def not_smoothed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """INT8 scores with the mean of the keys left in."""
    mean = torch.zeros_like(k[:, 0])
    q_values, q_scales, *_ = quantize_query(q, mean, scale=None)
    k_values, k_scales, _ = quantize_key(k, mean, None, tile_n=TILE)
    seen_q = q_values * each_row(q_scales, QUERY_ROWS, q.shape[1])
    return attend(seen_q, k_values * each_row(k_scales, TILE, k.shape[1]), v)


def seen(inputs: Inputs, quantization: str) -> Inputs:
    q, k, v, _ = dequantized(*inputs, None, quantization=quantization, scale=None, tile_n=TILE)
    return q, k, v


WAYS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "int8": lambda inputs: attend(*seen(inputs, "int8")),
    "int8, as read": lambda inputs: not_smoothed(*inputs),
    "int8, bits": lambda inputs: attend(*seen(inputs, "int8"), bits=True),
    "int8_fp8": lambda inputs: attend(*seen(inputs, "int8_fp8"), fp8=True),
}


def decibels(out: torch.Tensor, want: torch.Tensor) -> float:
    return float(10 * torch.log10(want.square().mean() / (out.double() - want).square().mean()))


def measure(queries: int, tokens: int, dim: int) -> list[list[str]]:
    """Return a row for each kind of data."""
    rows = []
    for name, make in DATA.items():
        torch.manual_seed(0)
        inputs = make(queries, tokens, dim)
        want = exact(*inputs)
        rows.append([name, *(f"{decibels(way(inputs), want):.1f}" for way in WAYS.values())])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=integer(1), default=8192, help="keys")
    parser.add_argument("--queries", type=integer(1), default=256, help="rows of the output")
    parser.add_argument("--head-dim", type=integer(1), default=128)
    args = parser.parse_args(arguments)
    print(text_table(["dB", *WAYS], measure(args.queries, args.tokens, args.head_dim)))


if __name__ == "__main__":
    main()
