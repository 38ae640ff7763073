"""The launches that find a rank's own experts, and copies of experts, under the interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve()
MISSING = importlib.util.find_spec("triton") is None


@pytest.mark.skipif(MISSING, reason="Triton is not installed (pip install triton)")
def test_under_the_interpreter(seed: int) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE), str(seed)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def _check(seed: int) -> None:
    from moetor.kernels.triton.held import copies_in_turn, held

    rng = torch.Generator().manual_seed(seed)
    for tokens, top_k, experts, slots in (
        (0, 2, 4, 2),
        (1, 1, 3, 1),
        (37, 3, 7, 4),
        (130, 8, 64, 9),
    ):
        table = torch.randint(0, slots + 1, (experts + 1,), generator=rng, dtype=torch.int32)
        ids = torch.randint(0, experts + 1, (tokens, top_k), generator=rng, dtype=torch.int32)
        weights = torch.rand((tokens, top_k), generator=rng)
        # As they arrive: weights' bits and ids in one tensor.
        packed = torch.cat((weights.view(torch.int32), ids), dim=1)
        for given in ((weights, ids), (packed.view(torch.float32)[:, :top_k], packed[:, top_k:])):
            ours = held(*given, table, slots)
            wanted = table[ids.long()]
            assert torch.equal(ours.topk_ids, wanted)
            assert torch.equal(ours.topk_weights, torch.where(wanted < slots, weights, 0.0))
            copies = torch.randint(0, 99, (experts + 1, 3), generator=rng, dtype=torch.int32)
            counts = torch.randint(1, 4, (experts + 1,), generator=rng, dtype=torch.int32)
            turns = torch.arange(tokens)[:, None] + torch.arange(top_k)
            wanted = copies[ids.long(), turns % counts[ids.long()]]
            assert torch.equal(copies_in_turn(given[1], copies, counts), wanted)


if __name__ == "__main__":
    _check(int(sys.argv[1]))
