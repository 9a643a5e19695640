"""Layout of the control tensor: everything about a state that changes between calls and is read on the device.

int32 words: a header, then one block per slot. A kernel that keeps to this page needs nothing from the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "BATCH",
    "DECIDED",
    "FLAGS",
    "FLAG_AUTO_STEP",
    "FLAG_DENSE",
    "FRESH",
    "JOBS",
    "NUM_STEPS",
    "QUERY_START",
    "REFRESH",
    "RESIDUALS",
    "SEQ_K",
    "SEQ_Q",
    "SIGNATURE",
    "SLOT",
    "SLOT_WORDS",
    "STEP",
    "TAKEN",
    "TICKETS",
    "Call",
    "control_list",
    "control_words",
    "new_control",
    "read_control",
    "slot_word",
    "write_control",
]

# Header.
SLOT = 0  # the slot that the next call reads and writes
NUM_STEPS = 1  # with auto-step, the step after this many is 0 again; 0 = never
REFRESH = 2  # every so many steps starts fresh; 0 = only step 0
FLAGS = 3
TICKETS = 4  # scratch of a kernel whose last CTA moves the step; 0 between calls
JOBS = 5  # scratch of a kernel whose CTAs take work as they become free; 0 between calls
QUERY_START = 6  # 1 + the key at which the first query stands, where queries are a part; 0 = they are of all keys
SIGNATURE = 7  # tells a control tensor from memory that nobody wrote
_HEADER_WORDS = 8
_SIGNED = 0x4C697465

FLAG_AUTO_STEP = 1  # the op moves the step of the slot after each call
FLAG_DENSE = 2  # skipping is off: visit everything, vote nothing, change nothing

# Block of one slot.
STEP = 0
FRESH = 1  # 1: the next call starts fresh; the op clears it
BATCH, SEQ_Q, SEQ_K = 2, 3, 4  # sizes of the last call; another size starts fresh
# Of `residual_attention` alone: residuals stored since the mask in use was taken, the last one in plane
# `(RESIDUALS - 1) % planes`; masks decided; the number of the mask in use, 0 = none. Mask n lies in half `n % 2`, and
# one waits to be taken iff DECIDED > TAKEN.
RESIDUALS, DECIDED, TAKEN = 5, 6, 7
SLOT_WORDS = 8


def control_words(slots: int) -> int:
    """Return the number of int32 words of a control tensor."""
    return _HEADER_WORDS + slots * SLOT_WORDS


def slot_word(slot: int, field: int) -> int:
    """Return the index of a word of a slot's block."""
    return _HEADER_WORDS + slot * SLOT_WORDS + field


def new_control(
    slots: int,
    *,
    num_steps: int = 0,
    refresh: int = 0,
    auto_step: bool = True,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return the control tensor of a state that has not been called yet."""
    words = [0] * control_words(slots)
    words[NUM_STEPS], words[REFRESH], words[FLAGS] = num_steps, refresh, FLAG_AUTO_STEP * auto_step
    words[SIGNATURE] = _SIGNED
    return torch.tensor(words, dtype=torch.int32, device=device)


def control_list(control: torch.Tensor) -> list[int]:
    """Return the words of a control tensor. Waits for the device.

    Raises:
        ValueError: it holds what nobody wrote as one.
    """
    words: list[int] = control.tolist()
    if words[SIGNATURE] not in (_SIGNED, 0):  # 0: written by version 0.1
        raise ValueError(
            f"control: expected a state, got memory that nobody wrote: {words[:4]}...; was the state offloaded "
            "to disk, which saves it once and never again? Keep it on the device, or make a new one"
        )
    return words


class Call(NamedTuple):
    """What the control tensor says about this call."""

    slot: int
    step: int
    fresh: bool
    dense: bool
    next_step: int
    query_start: int | None


def read_control(control: torch.Tensor, slots: int, sizes: tuple[int, int, int]) -> Call:
    """Return what a call at (batch, seq_q, seq_k) is to do. Waits for the device.

    Raises:
        ValueError: a slot or step out of range, or what nobody wrote.
    """
    words = control_list(control)
    slot = words[SLOT]
    if not 0 <= slot < slots:
        raise ValueError(f"control: expected a slot from 0 to {slots - 1}, got {slot}")
    step = words[slot_word(slot, STEP)]
    if step < 0:
        raise ValueError(f"control: expected a step of at least 0, got {step}")
    last = tuple(words[slot_word(slot, field)] for field in (BATCH, SEQ_Q, SEQ_K))
    refresh, num_steps, flags = words[REFRESH], words[NUM_STEPS], words[FLAGS]
    fresh = step == 0 or words[slot_word(slot, FRESH)] != 0 or (refresh > 0 and step % refresh == 0) or last != sizes
    next_step = step
    if flags & FLAG_AUTO_STEP:
        next_step = 0 if num_steps > 0 and step + 1 >= num_steps else step + 1
    query_start = words[QUERY_START] - 1 if words[QUERY_START] > 0 else None
    return Call(slot, step, fresh, bool(flags & FLAG_DENSE), next_step, query_start)


def write_control(control: torch.Tensor, call: Call, sizes: tuple[int, int, int], counts: tuple[int, ...] = ()) -> None:
    """Note that a call at (batch, seq_q, seq_k) has been done; counts are RESIDUALS, DECIDED and TAKEN, if any."""
    block = {STEP: call.next_step, FRESH: 0, BATCH: sizes[0], SEQ_Q: sizes[1], SEQ_K: sizes[2]}
    first = slot_word(call.slot, 0)
    values = [*(block[field] for field in range(len(block))), *counts]
    control[first : first + len(values)].copy_(torch.tensor(values, dtype=torch.int32, device="cpu"))
