"""These tests have the marker `gpu`, run where a GPU and its kernels are, and are skipped elsewhere.

On Hopper those with the fixture `each_kernel` run for both kernels; -k "not portable" leaves one out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.gpu_cases import KERNELS_HERE, running


@pytest.fixture(scope="module", params=KERNELS_HERE, ids=lambda implementation: implementation or "own")
def each_kernel(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Run cases on the GPU's own kernel, and on the portable one."""
    with running(request.param) as implementation:
        yield implementation


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    from lite_attention.cute_kernels import unsupported_reason

    return unsupported_reason(128, 128, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = _missing() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
