"""Each test starts with nothing compiled, nobody's branches, and the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lite_attention
from lite_attention.ops import default_session


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The tensors are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    lite_attention.reset()
    default_session.is_told = False
