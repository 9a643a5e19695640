"""Are the transformers of diffusers what they were when nothing is skipped? Eager and compiled, at threshold -inf.

    python -m benchmarks.diffusers_configs [--only WanTransformer3DModel ...] [--inner eager]

Each class is built tiny and random, in float32, and runs once: some minutes on a CPU. Prints a line a class, with the
sites that are skip-aware of those that were seen, and the largest difference to dense. Exits with 1 if one is off.
"""

from __future__ import annotations

import argparse
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import lite_attention
from benchmarks.diffusers_small import CONFIGS, build, run

TILE = (16, 16)
MOST_OFF = 1e-6  # of outputs of the order of 1


def compare(name: str, inner: str | None) -> tuple[str, float]:
    """Return how many sites are skip-aware, as text, and by how much a model is off that skips nothing.

    Args:
        name: of the class.
        inner: what compiles; None = eager.
    """
    model, inputs = build(name)
    dense = run(model, inputs)
    torch._dynamo.reset()
    options: dict[str, Any] = {"compile": False} if inner is None else {"compile": True, "inner": inner}
    lite_attention.enable(model, threshold=-math.inf, tile_shape=TILE, **options)
    error = float((run(model, inputs) - dense).abs().max())
    report = lite_attention.report(model, file=io.StringIO())
    return f"{len(report.swapped)} of {len(report.rows)}", error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, metavar="CLASS", help="some classes instead of all")
    parser.add_argument("--inner", default="eager", help="what compiles, such as inductor")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # a site that is left alone is in the table
    rows, failed = [], 0
    for name in tqdm(args.only or CONFIGS):
        row = [name]
        for inner in (None, args.inner):
            try:
                sites, error = compare(name, inner)
                row += [sites, f"{error:.1e}"]
                failed += error > MOST_OFF
            except Exception as error:  # the next class may do better
                row += ["-", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:60]}"]
                failed += 1
        rows.append(row)
    print(tabulate(rows, ["class", "sites, eager", "off", "sites, compiled", "off"], disable_numparse=True))
    print(f"{2 * len(rows) - failed} of {2 * len(rows)} within {MOST_OFF:.0e} of dense")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
