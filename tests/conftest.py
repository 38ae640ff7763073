"""What every test shares: fresh random numbers, few threads, poisoned memory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=None, help="repeat a failure: the seed that it printed"
    )


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A new seed for every test, printed, so that a failure can be repeated with `--seed`."""
    given = request.config.getoption("--seed")
    value = secrets.randbelow(2**31) if given is None else int(given)
    print(f"repeat with: pytest {request.node.nodeid!r} --seed {value}")
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors whose content is not defined are full of NaN, so that nothing may rely on it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
