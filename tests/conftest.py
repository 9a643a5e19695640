"""Each test starts with the same random numbers, nothing compiled, and nobody's branches, steps or states."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lite_attention.ops import default_session

torch.set_num_threads(1)  # the tensors are small, and pytest-xdist has the cores


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    default_session.clear()
