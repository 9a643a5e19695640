"""Two and four processes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks, ranks_of


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    with ranks_of(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    with ranks_of(4) as ranks:
        yield ranks
