"""What ranks report of a model that they share; each function runs on all ranks, against one process where it says."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lite_attention
from lite_attention import LiteAttention
from lite_attention.report_gather import gathered_report
from lite_attention.report_rows import Report
from tests.support import exchange_cases
from tests.support.context_parallel_cases import (
    STEPS,
    Inputs,
    diffusers_on_cpus,
    enable,
    generation,
    odd_video,
    split,
    video,
    wan,
)  # fmt: skip

RESIDUAL: dict[str, Any] = {"threshold": None, "method": "residual", "full_every": 2, "residual_dtype": "fp32"}


def silent(model: Any, **options: Any) -> Report:
    return lite_attention.report(model, file=io.StringIO(), **options)


def of_model(
    degrees: dict[str, Any], heads: int = 4, tokens: int = 96, options: dict[str, Any] | None = None
) -> tuple[Report, Report, Report]:
    """Return the reports of here, of all ranks, and of one process, after a generation."""
    inputs: Inputs = video if tokens == 96 else odd_video
    options = {"threshold": -3.0, **(options or {})}
    with diffusers_on_cpus():
        one, model = enable(wan(heads), **options), enable(split(wan(heads), **degrees), **options)
        for x in (one, model):
            generation(x, inputs)
    found = silent(model), silent(model, process_group=dist.group.WORLD), silent(one)
    for report in found:
        for row in report.rows:
            row.state = None  # it does not travel
    return found


def by_hand(key_ranks: int, parts: int) -> tuple[Report, Report, list[int], float]:
    """Return the reports of here and of all ranks of a `LiteAttention`, which heads are here, and the share logged."""
    group, key_group = exchange_cases.groups(key_ranks)
    attn = LiteAttention(threshold=-3.5, num_steps=STEPS, process_group=group, key_group=key_group, parts=parts)
    model = nn.ModuleDict({"attn": attn})
    case = exchange_cases.Case(count=512)
    for step in range(2 * STEPS + 1):  # until heads are dealt by what they cost
        attn(*map(exchange_cases.part, exchange_cases.tokens(case, step % STEPS)))
    log = lite_attention.SparsityLog(model)
    log.record()
    here, of_all = silent(model), silent(model, process_group=dist.group.WORLD)
    for report in (here, of_all):
        report.rows[0].state = None
    assert attn.exchange is not None
    return here, of_all, sorted(attn.exchange.own_heads.tolist()), log.steps[-1]["attn"]


def printed(gathered: bool) -> str:
    """Return what a rank prints."""
    model = nn.ModuleDict({"attn": LiteAttention(num_steps=STEPS, process_group=dist.group.WORLD)})
    model["attn"](*map(exchange_cases.part, exchange_cases.tokens(exchange_cases.Case(), 0)))
    out = io.StringIO()
    with redirect_stdout(out):
        if gathered or dist.get_rank() == 0:  # one alone may ask for what is here
            lite_attention.report(model, process_group=dist.group.WORLD if gathered else None)
    return out.getvalue()


def with_notes() -> tuple[list[str | None], list[str | None]]:
    """Return notes and reasons of all ranks' report where rank 1 says otherwise."""
    model = enable(wan(), threshold=-3.0)
    generation(model)
    report = silent(model)
    if dist.get_rank() == 1:
        report.rows[0].note, report.rows[2].reason = "dense", "none"
    found, _ = gathered_report(lambda: report, dist.group.WORLD)
    return [row.note for row in found.rows[::2]], [row.reason for row in found.rows[::2]]


def failing() -> str:
    """Return what a rank is told where rank 1 gives what is no model."""
    model = enable(wan()) if dist.get_rank() == 0 else torch.zeros(1)
    try:
        silent(model, process_group=dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
