"""One pool of workers per size for all tests of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parallel.pool import Pool


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()
