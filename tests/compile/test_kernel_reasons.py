"""Which attention a kernel can compute is known before anything is swapped."""

from __future__ import annotations

import pytest
import torch

from lite_attention.compile import SkipSettings
from lite_attention.cute_kernels import launch
from lite_attention.ops.site import Site
from lite_attention.ops.targets import SM90A


def test_residuals_that_no_kernel_stores_are_told_before_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "target_of", lambda *_: SM90A)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "has_compiler", lambda: True)
    monkeypatch.setattr(launch, "library", lambda: None)
    shape = (1, 4096, 2, 128)
    site = Site("attn", "Attention", 0, shape, shape, shape, torch.bfloat16, torch.device("cuda", 0))
    launch.unsupported_reason.cache_clear()
    reasons = {
        stored: SkipSettings(method="residual", residual_dtype=stored).unsupported_reason(site)
        for stored in (None, "fp8", "bf16", "fp32")
    }
    launch.unsupported_reason.cache_clear()
    said = "the Hopper kernel stores residuals in fp8 or bf16, got fp32"
    assert reasons == {None: None, "fp8": None, "bf16": None, "fp32": said}
