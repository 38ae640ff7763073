"""Reading a range of GPU memory as fast as it goes, in Triton."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

# (elements of a load, loads of a program): which is best differs between GPUs.
PATTERNS = ((2048, 4), (4096, 4), (8192, 2), (4096, 8))


@triton.jit
def read_stream(data, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Each program's sum of BLOCK * STEPS neighbouring elements."""
    total = tl.zeros((BLOCK,), tl.float32)
    base = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    for step in tl.static_range(STEPS):
        total += tl.load(data + base + step * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


def read_all(data: Tensor, block: int, steps: int) -> Tensor:
    """The sums [len(data) / (block * steps)] in float32; `data` is read once, whole.

    Args:
        data: contiguous, a multiple of block * steps elements; the rest would not be read.
    """
    out = data.new_empty((data.numel() // (block * steps),), dtype=torch.float32)
    read_stream[(out.numel(),)](data, out, BLOCK=block, STEPS=steps, num_warps=8)
    return out
