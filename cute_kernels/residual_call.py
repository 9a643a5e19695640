"""What a call with a residual is, read once from its state, and what it leaves there; rules: `contract.md`."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from lite_attention.cute_kernels.config import Residual
from lite_attention.cute_kernels.ptx import as_float, as_int
from lite_attention.ops import control as c

# Words of a call in shared memory. The first three are there without a residual, too.
SLOT, FRESH, DENSE = range(3)
FULL = 3  # 0: sparse
MASKED = 4  # some mask is in use: kept tiles come first, or alone
HALF = 5  # of the skip mask, that is in use
PLANE = 6  # where the residual goes, or is
DECIDES = 7  # the word after it is 0
FACTOR = 14  # bits of a float32: of the difference of two residuals
NOW = 9  # bits of a float32: the flow's time
RESIDUALS, DECIDED, TAKEN = 10, 11, 12  # as they will be in the control tensor
SAMPLES = 13  # a sample of the tiles comes first: there is no LSE of the step before
CALL_WORDS = 16


@cute.jit
def begin(control, residual: Residual, call, block: Int32, slot: Int32, fresh: Boolean, dense: Boolean):
    """One thread: find out what a call is; `block` is where the words of its slot begin."""
    step = control[block + c.STEP]
    residuals, decided, taken = Int32(0), Int32(0), Int32(0)
    if not (fresh | dense):
        residuals, decided, taken = control[block + c.RESIDUALS], control[block + c.DECIDED], control[block + c.TAKEN]
    planned = residual.plan[cutlass.max(cutlass.min(step, residual.plan.shape[0] - 1), 0)]
    full = dense | fresh | (planned > 0) | (residuals == 0)
    if full & (decided > taken):
        taken, residuals = decided, Int32(0)
    decides = full & ~dense & ((planned > 1) | (decided == 0))
    now = residual.times[slot, 0]
    if now != now:
        now = Float32(step)
    planes = residual.values.shape[1]
    plane, factor = residuals % planes, Float32(0.0)
    if not full:
        plane = (residuals - 1) % planes
        if (planes == 2) & (residuals > 1):
            last, before = residual.times[slot, 1], residual.times[slot, 2]
            factor = (now - last) / (last - before)
            if factor - factor != 0.0:  # infinite, or NaN
                factor = Float32(0.0)
    call[FULL], call[MASKED], call[HALF], call[PLANE] = Int32(full), Int32(taken > 0), taken % 2, plane
    call[DECIDES], call[FACTOR], call[NOW] = Int32(decides), as_int(factor), as_int(now)
    call[RESIDUALS] = residuals + Int32(full & (taken > 0))
    call[DECIDED], call[TAKEN] = decided, taken
    call[SAMPLES] = Int32(fresh & ~dense)
    call[DECIDES + 1] = Int32(0)
    if decides:
        call[DECIDED] = taken + 1


@cute.jit
def end(control, residual: Residual, call, block: Int32, step: Int32):
    """One thread, the last of a call that is not dense: note what it did."""
    slot = call[SLOT]
    control[block + c.RESIDUALS] = call[RESIDUALS]
    control[block + c.DECIDED] = call[DECIDED]
    control[block + c.TAKEN] = call[TAKEN]
    if (call[FULL] != 0) & (call[MASKED] != 0):
        residual.times[slot, 2] = residual.times[slot, 1]
        residual.times[slot, 1] = as_float(call[NOW])
    if call[DECIDES] != 0:
        decision = residual.decision
        decision[0], decision[1], decision[2], decision[3] = Int32(1), slot, call[DECIDED] % 2, step
