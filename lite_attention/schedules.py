"""Thresholds by step, head and branch, as tables that live on the device.

A threshold is in log2 units, at most 0: at -6, a tile is skipped from the next step on when in every row its largest
weight is at most 2^-6 of the largest seen before it. More negative skips less, and at -inf a step votes nothing out,
though what earlier steps voted out stays out. So dense steps belong at the start; `refresh=` makes later ones.

A schedule is a float32 tensor on the CPU that broadcasts to (slots, steps, heads), for `threshold=` of
`lite_attention.enable` and the others, and for `lite_attention.set_threshold`. After its last step the last one holds.
Every number below may also be a tensor (heads,). Other thresholds for other layers: give a callable of the layer.
"""

from __future__ import annotations

import torch

from lite_attention.ops.arguments import check_count, threshold_values

__all__ = ["branches", "constant", "dense_first", "linear", "three_segments"]

Row = float | torch.Tensor  # of one step: for all heads, or (heads,)


def constant(threshold: Row) -> torch.Tensor:
    """Return the schedule of one threshold, (1, heads or 1)."""
    return _row("threshold", threshold).unsqueeze(0)


def three_segments(num_steps: int, early: Row, middle: Row, late: Row) -> torch.Tensor:
    """Return a schedule of three equal segments, (num_steps, heads or 1).

    The paper (arXiv 2511.11062) cuts a generation so, since errors of early steps matter more.

    Args:
        num_steps: denoising steps, at least 3. What three does not divide goes to the earlier segments.
        early: threshold of the first third.
        middle: of the second.
        late: of the last.

    Raises:
        ValueError: fewer steps than segments.
    """
    num_steps = check_count("num_steps", num_steps, least=3)
    rows = _rows(early=early, middle=middle, late=late)
    return rows[torch.arange(num_steps, device="cpu") * 3 // num_steps]


def linear(num_steps: int, first: Row, last: Row) -> torch.Tensor:
    """Return a schedule that runs from one threshold to another in equal parts, (num_steps, heads or 1).

    Args:
        num_steps: denoising steps, at least 2.
        first: threshold of step 0.
        last: of step num_steps - 1.

    Raises:
        ValueError: fewer than two steps, or an end that is not finite; for dense steps see `dense_first`.
    """
    num_steps = check_count("num_steps", num_steps, least=2)
    ends = _rows(first=first, last=last)
    if not bool(ends.isfinite().all()):
        raise ValueError(f"first, last: expected finite thresholds, got {first} and {last}; see dense_first for -inf")
    part = torch.linspace(0, 1, num_steps, dtype=torch.float32, device="cpu").unsqueeze(1)
    return torch.lerp(ends[0], ends[1], part)


def dense_first(schedule: Row, steps: int) -> torch.Tensor:
    """Return a schedule whose first steps skip nothing: (slots, steps, heads) as given, or (steps + 1, heads or 1).

    Args:
        schedule: a number, or a tensor that broadcasts to (slots, steps, heads). One of a single step follows after the
            dense ones; of a longer one the first steps are replaced.
        steps: how many are dense.

    Raises:
        ValueError: a negative number of steps, or no fewer than the schedule has.
    """
    table = _values("schedule", schedule)
    if table.dim() > 3:
        raise ValueError(f"schedule: expected at most (slots, steps, heads), got shape {tuple(table.shape)}")
    table = table if table.dim() > 1 else constant(table)
    steps = check_count("steps", steps, least=0)
    if table.shape[-2] == 1:
        table = table.repeat_interleave(steps + 1, -2)
    if steps >= table.shape[-2]:
        raise ValueError(f"steps: expected 0 to {table.shape[-2] - 1}, fewer than the schedule has, got {steps}")
    table = table.clone()
    table[..., :steps, :] = -torch.inf
    return table


def branches(*schedules: Row) -> torch.Tensor:
    """Return a schedule of each branch's own, (slots, steps, heads or 1), in the order in which branches first run.

    Args:
        schedules: of each branch, cond first: a number, or a tensor that broadcasts to (steps, heads).

    Raises:
        ValueError: none is given, or two that do not broadcast.
    """
    if not schedules:
        raise ValueError("schedules: expected one for each branch, got none")
    values = [_values("schedules", schedule) for schedule in schedules]
    tables = [table if table.dim() == 2 else constant(table) for table in values]
    steps = max(table.shape[0] for table in tables)
    tables = [torch.cat([table, table[-1:].expand(steps - len(table), -1)]) for table in tables]
    try:
        return torch.stack(torch.broadcast_tensors(*tables))
    except RuntimeError:
        heads = [table.shape[1] for table in tables]
        raise ValueError(f"schedules: expected one number of heads, or 1, in all, got {heads}") from None


def _values(name: str, threshold: Row) -> torch.Tensor:
    """Return float32 on the CPU, whatever the defaults are and wherever a tensor lives."""
    return threshold_values(name, threshold).cpu()


def _row(name: str, threshold: Row) -> torch.Tensor:
    row = _values(name, threshold)
    if row.dim() > 1:
        raise ValueError(f"{name}: expected a number or a tensor (heads,), got shape {tuple(row.shape)}")
    return row.reshape(-1)


def _rows(**thresholds: Row) -> torch.Tensor:
    """Return the rows below each other, (rows, heads or 1)."""
    rows = [_row(name, threshold) for name, threshold in thresholds.items()]
    try:
        return torch.stack(torch.broadcast_tensors(*rows))
    except RuntimeError:
        heads = [len(row) for row in rows]
        raise ValueError(f"{', '.join(thresholds)}: expected one number of heads, or 1, in all, got {heads}") from None
