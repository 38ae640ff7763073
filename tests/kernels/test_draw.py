"""Drawing without a sort against a sort in float64, under Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from interpreted import needs_triton, run_interpreted
from kernels.draw_cases import check_draws, check_ties

HERE = Path(__file__).resolve()


@needs_triton
def test_under_the_interpreter(seed: int) -> None:
    run_interpreted(HERE, str(seed))


def main(seed: int) -> None:
    import torch

    from interpreted import allow_loop_bounds
    from moetor.kernels.triton import draw

    allow_loop_bounds()
    draw._BLOCK = 64
    check_ties(draw.draw)
    check_draws(draw.draw, torch.Generator().manual_seed(seed), size=150, rows=12)


if __name__ == "__main__":
    main(int(sys.argv[1]))
