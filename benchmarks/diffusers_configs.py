"""Are the transformers of diffusers what they were when nothing is skipped? Eager and compiled, at threshold -inf.

    python -m benchmarks.diffusers_configs [--only WanTransformer3DModel ...] [--inner eager]
    python -m benchmarks.diffusers_configs --page     # writes docs/reference/models.md: some seconds

Each class is built tiny and random, in float32, and runs once: some minutes on a CPU. Prints a line a class, with the
sites that are skip-aware of those that were seen, and the largest difference to dense. Exits with 1 if one is off.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import lite_attention
from benchmarks.diffusers_small import CONFIGS, build, run
from lite_attention.token_grid import grid_of_call
from lite_attention.token_layout import layout_of_call
from lite_attention.token_order import check

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


# ---- the page of models ----------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs/reference/models.md"
_TEXT = """# Models of diffusers

What `lite_attention.enable` finds in each transformer of diffusers {version}, and why it leaves the rest to PyTorch.
This page is made by

```
python -m benchmarks.diffusers_configs --page
```

which runs each class once, eagerly, tiny and random, with masks of text that is padded; a test holds the page to it.
Attention is found by data flow, so a class that is not here may well do.

* **Skips**: sites that skip, of those that ran. Which these are for your sizes, `lite_attention.report(model)` says.
* **Left alone**: the others. Most are cross-attention, which has few keys. What is no softmax attention, as the
  linear one of Sana, is no site.
* **Order**: `token_order="tile3d"` reorders its tokens. **Patterns**: those of `lite_attention.masks` are held
  against the video's size. **Exact**: by itself, `enable` leaves out of skipping what is not of the picture; in others,
  `exact_tokens` names it.
* **Tested**: *numbers* means step by step against states held by hand, *pipeline* a real pipeline of tiny parts. All
  others are held to dense at threshold -inf, eager and compiled, by the same command without `--page`.

Compiled, Mochi's blocks stay dense, as they loop over samples of lengths that depend on data: use `compile=False`.
LTX-2.3 and 2.5 are `LTX2VideoTransformer3DModel`.

{table}

Not run by this command, as nobody has written their inputs down: {others}.
"""


def page() -> str:
    """Return the text of `docs/reference/models.md`."""
    tested = _tested()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [_row(name, tested) for name in sorted(CONFIGS)]
    table = tabulate(rows, ["class", "skips", "left alone", "order", "patterns", "exact", "tested"], "github")
    others = ", ".join(f"`{name}`" for name in _classes() if name not in CONFIGS)
    return _TEXT.format(version=diffusers.__version__, table=table, others=others)


def _row(name: str, tested: dict[str, set[str]]) -> list[str]:
    model, inputs = build(name)
    has_grid, has_layout = (told(model, (), inputs) is not None for told in (grid_of_call, layout_of_call))
    lite_attention.enable(model, compile=False, threshold=-math.inf, tile_shape=TILE)
    run(model, inputs)
    report = lite_attention.report(model, file=io.StringIO())
    reasons: dict[str, set[str]] = defaultdict(set)
    for row in report.rows:
        if row.reason is not None:
            reasons[row.reason.partition(", shape")[0]].add(".".join(re.sub(r"\.\d+", "", row.name).split(".")[-2:]))
    left = "; ".join(f"{', '.join(sorted(names))}: {reason}" for reason, names in reasons.items())
    marks = ["tile3d" if _can_reorder(model) else "", "yes" if has_grid else "", "yes" if has_layout else ""]
    return [f"`{name}`", f"{len(report.swapped)} of {len(report.rows)}", left, *marks, ", ".join(sorted(tested[name]))]


def _can_reorder(model: nn.Module) -> bool:
    try:
        check("tile3d", model)
    except ValueError:
        return False
    return True


def _tested() -> dict[str, set[str]]:
    """Return how the tests hold each class, by its name."""
    # The tests' types are not checked, so mypy is not to see them.
    diffusers_models, pipelines = (import_module(f"tests.support.{name}") for name in ("diffusers_models", "pipelines"))
    found: dict[str, set[str]] = defaultdict(set)
    for case in vars(diffusers_models).values():
        if isinstance(case, diffusers_models.Case) and case.swapped:
            found[type(case.build()).__name__].add("numbers")
    for build_pipeline in pipelines.BUILDERS:
        found[type(build_pipeline().transformer).__name__].add("pipeline")
    return found


def _classes() -> list[str]:
    """Return the transformers that diffusers exports."""
    found = [name for name in dir(diffusers) if "Transformer" in name or name.endswith("DiT")]
    return [name for name in found if isinstance(cls := getattr(diffusers, name), type) and issubclass(cls, nn.Module)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, metavar="CLASS", help="some classes instead of all")
    parser.add_argument("--inner", default="eager", help="what compiles, such as inductor")
    parser.add_argument("--page", action="store_true", help="write docs/reference/models.md instead")
    args = parser.parse_args(arguments)
    if args.page:
        PAGE.write_text(page())
        return 0
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
