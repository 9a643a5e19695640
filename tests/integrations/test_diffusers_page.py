"""The page of models says what is so."""

from __future__ import annotations

import pytest

from benchmarks.diffusers_configs import PAGE, page


@pytest.mark.slow
def test_page_is_current() -> None:
    """Otherwise: python -m benchmarks.diffusers_configs --page."""
    assert page() == PAGE.read_text()
