"""What a call of the CPU kernel takes of the heap: the scores of one row of tiles, not those of the call."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CALL = """
import resource
import sys
import torch
import lite_attention

torch.set_num_threads(1)
tokens = torch.randn(1, 8192, 1, 16)
if sys.argv[1] == "residual":
    state = lite_attention.ResidualState.for_inputs(tokens, tokens, tokens, plan=[2])
    def attention(q, k, v):
        lite_attention.residual_attention(q, k, v, state)
        lite_attention.residual_attention(q, k, v, state)
else:
    attention = lite_attention.LiteAttention(threshold=float(sys.argv[1])).allocate(1, 8192, 1, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention(tokens, tokens, tokens)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss, and glibc's switch")
@pytest.mark.parametrize("method", ["-inf", "-1", "residual"])
def test_what_a_row_leaves_does_not_hold_the_heap(method: str) -> None:
    """With all blocks on one heap, a small tensor a row between the large ones kept 130 MiB and more."""
    heap = {**os.environ, "MALLOC_MMAP_MAX_": "0"}
    command = [sys.executable, "-c", CALL, method]
    result = subprocess.run(command, env=heap, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 32 * 1024  # in KiB; a row has 2 MiB of scores, the call 256
