"""Drawing among the likeliest tokens on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.draw_cases import check_draws, check_ties
from moetor.kernels.triton.draw import draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("size", [150, 32000, 151936])
def test_draws(size: int, rng: torch.Generator) -> None:
    check_draws(draw, rng, size=size, rows=24, device="cuda")


def test_ties() -> None:
    check_ties(draw, device="cuda")
