"""The page of cards, from the table of targets."""

from __future__ import annotations

from lite_attention.ops.targets import SM90, TARGETS, Target

__all__ = ["page"]

# What people call the GPUs of a compute capability.
_NAMES = {
    (8, 0): "A100, A30", (8, 6): "RTX 30, A10, A40, RTX A6000", (8, 7): "Orin", (8, 9): "L4, L40S, RTX 40",
    (9, 0): "H100, H200, H20, GH200", (10, 0): "B200, GB200", (10, 3): "B300, GB300", (11, 0): "Thor",
    (12, 0): "RTX 50, RTX PRO 6000", (12, 1): "DGX Spark",
}  # fmt: skip

_TOP = """# Cards

`python -m lite_attention check` says which kernel runs on your card, and tries it. GPUs that are not here keep
PyTorch's attention, and the report says why; so do AMD's. All kernels have both methods, in bf16 and fp16. A CPU runs
everything, in any dtype and head dim.

Only H100 and H200 were at hand. The portable kernel passes its tests on an H200, and is timed there. **For its own
cards it is compiled and checked without the card**: registers, spills and instructions in the machine code.

This page is made from `ops/targets.py` by `python -m tools.pages`.

| card | compute capability | kernel | head dims | INT8 scores | INT8 and FP8 | run on it |
|---|---|---|---|---|---|---|
"""

_TILES = """
## Tiles

Queries x keys of a tile of the skip mask: the unit that is skipped, by architecture and head dim.

| architecture | quantization | {head_dims} |
|---|---|{lines}|
"""


def page() -> str:
    """Return the page: a row for each compute capability, and the tiles."""
    own = [target for target in TARGETS.values() if target is not SM90]  # which Hopper has beside its own
    rows = [_row(target, capability) for target in own for capability in target.capabilities]
    notices = {target.notice: None for target in own if target.notice}
    noted = [f"\nOn {_cards(notice)}: {notice}.\n" for notice in notices]
    head_dims = sorted({dim for target in TARGETS.values() for dim in target.head_dims()})
    header = _TILES.format(head_dims=" | ".join(map(str, head_dims)), lines="---|" * (len(head_dims) - 1) + "---")
    tiles = [_tiles(target, name, head_dims) for target in TARGETS.values() for name in target.tiles]
    return _TOP + "\n".join(rows) + "\n" + "".join(noted) + header + "\n".join(tiles) + "\n"


def _row(target: Target, capability: tuple[int, int]) -> str:
    kernel = "portable" if target.portable else f"{target.title}'s own"
    dims = [_listed(target.head_dims(name)) for name in ("none", "int8", "int8_fp8")]
    run = "yes, H100 and H200" if capability == (9, 0) else "no"
    return f"| {_NAMES[capability]} | {capability[0]}.{capability[1]} | {kernel} | {' | '.join(dims)} | {run} |"


def _listed(head_dims: tuple[int, ...]) -> str:
    return ", ".join(map(str, head_dims)) or "no"


def _cards(notice: str) -> str:
    capabilities = [c for target in TARGETS.values() if target.notice == notice for c in target.capabilities]
    return ", ".join(_NAMES[capability] for capability in capabilities)


def _tiles(target: Target, name: str, head_dims: list[int]) -> str:
    shapes = [target.tiles[name].get(dim) for dim in head_dims]
    cells = [f"{shape[0]} x {shape[1]}" if shape else "" for shape in shapes]
    return f"| `{target.name}` | {name} | {' | '.join(cells)} |"
