"""The two ceilings of an attention kernel on this GPU: the rate of matrix products, and that of exponentials.

    python -m benchmarks.ceilings [--seconds 1] [--json FILE]

Matrix rate: the fastest bf16 `torch.matmul` of a few sizes on random numbers, launched back to back, each in a block of
its own. Exp rate: ex2.approx in registers, 16 independent chains a thread, no memory traffic. A score of head dim D
takes 4 D operations of the one kind and one of the other; the bounds are TFLOP/s of attention if the two overlap
wholly, or not at all. The rest of a softmax (maximum, scale, sum, conversion) is not in them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from benchmarks.measure import begin
from lite_attention.cli.arguments import new_file, number
from lite_attention.cli.timing import block
from lite_attention.ops.targets import SM90A

SIZES = [(4096, 4096, 4096), (8192, 8192, 8192), (8192, 8192, 16384), (16384, 16384, 16384)]  # M, N, K
HEAD_DIMS = SM90A.head_dims()
ROUNDS = 2048  # exponentials of each chain
BLOCK = 2048  # chains of a program: 16 a thread
WARPS = 4
PROGRAMS_AN_SM = 64  # four waves of 16
IN_A_ROW = 8  # calls without a gap between them


def matrix_rates(seconds: float) -> dict[str, float]:
    """Return TFLOP/s by size and layout."""
    rates = {}
    for m, n, k in SIZES:
        a, b, bt = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((m, k), (k, n), (n, k)))
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        for layout, right in (("A B", b), ("A B^T", bt.t())):
            ms = block(lambda a=a, right=right, out=out: torch.matmul(a, right, out=out), seconds, in_a_row=IN_A_ROW)  # type: ignore[misc]
            rates[f"{m} x {n} x {k}, {layout}"] = 2 * m * n * k / ms / 1e9
    return rates


def exp_rate(seconds: float) -> float:
    """Return G exp/s."""
    from benchmarks.exponentials import exponentials  # Triton is not on every machine

    programs = PROGRAMS_AN_SM * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * BLOCK, device="cuda")
    ms = block(lambda: exponentials[(programs,)](out, ROUNDS, BLOCK=BLOCK, num_warps=WARPS), seconds, in_a_row=IN_A_ROW)
    return programs * BLOCK * ROUNDS / ms / 1e6


def bounds(matrix: float, exp: float) -> list[dict[str, float]]:
    """Return the bounds by head dim, from TFLOP/s and G exp/s."""
    rows = []
    for dim in HEAD_DIMS:
        flops = 4 * dim
        of_matrix, of_exp = flops / matrix, 1e3 / exp  # ps a score
        rows.append({
            "head_dim": dim, "matrix_ps": of_matrix, "exp_ps": of_exp, "overlapped": flops / max(of_matrix, of_exp),
            "in_turn": flops / (of_matrix + of_exp),
        })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=number(above=0), default=1.0, help="length of a block")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(arguments)

    about = begin("triton")
    matrix = matrix_rates(args.seconds)
    for name, rate in matrix.items():
        print(f"  matmul {name:32}{rate:8.0f} TFLOP/s", flush=True)
    exp = exp_rate(args.seconds)
    print(f"\nmatrix rate {max(matrix.values()):.0f} TFLOP/s, exp rate {exp:.0f} G exp/s\n")
    rows = bounds(max(matrix.values()), exp)
    print(f"{'':10}{'ps a score':>24}{'TFLOP/s of attention':>32}")
    print(f"{'head dim':10}{'matrix':>12}{'exp':>12}{'wholly overlapped':>20}{'in turn':>12}")
    for row in rows:
        times = f"{row['matrix_ps']:12.3f}{row['exp_ps']:12.3f}"
        print(f"{row['head_dim']:<10}{times}{row['overlapped']:20.0f}{row['in_turn']:12.0f}")
    if args.json:
        args.json.write_text(json.dumps({**about, "matrix": matrix, "exp": exp, "bounds": rows}, indent=1))


if __name__ == "__main__":
    main()
