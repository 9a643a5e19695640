"""The Triton kernel of `ceilings`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def exponentials(out, rounds, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton takes no other types
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = place.to(tl.float32) * 1e-6
    for _ in range(rounds // 8):
        for _ in tl.static_range(8):  # soon infinite, which takes as long as any other number
            x = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
    tl.store(out + place, x)
