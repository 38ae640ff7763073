"""Products of a few rows with a weight that is read once, by vector sums.

Shape letters: H hidden, N outputs; BT rows, BN and BK of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from triton.language.extra.cuda import (  # type: ignore[import-not-found, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from moetor.kernels.triton.device_code import activate_gated


@triton.jit(do_not_specialize=["rows"])
def few_rows(
    x,
    weight,
    bias,
    out,
    rows,
    up_offset,
    stride_x,
    stride_n,
    BT: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[BT rows, BN columns] = x @ weight.T + bias in float32 vector sums.

    With GATED, activation(gate) * up of the rows n and n + up_offset / stride_n of the weight.
    The first weights are on their way before the launch before has ended.
    """
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    # A row alone is there.
    real = (t < rows) | (BT == 1)
    pointers = weight + n.to(tl.int64)[:, None] * stride_n + k[None, :]
    inputs = x + t.to(tl.int64)[:, None] * stride_x + k[None, :]
    EVEN: tl.constexpr = H % BK == 0 and N % BN == 0
    acc = tl.zeros((BT, BN, BK), tl.float32)
    acc_up = tl.zeros((BT, BN, BK), tl.float32)
    for k0 in tl.range(0, H, BK, num_stages=STAGES):
        if EVEN:
            w = tl.load(pointers + k0, eviction_policy="evict_first")
            if GATED:
                v = tl.load(pointers + k0 + up_offset, eviction_policy="evict_first")
        else:
            inside = (n[:, None] < N) & (k[None, :] < H - k0)
            w = tl.load(pointers + k0, mask=inside, other=0.0)
            if GATED:
                v = tl.load(pointers + k0 + up_offset, mask=inside, other=0.0)
        if PDL and k0 == 0:
            gdc_wait()
        row = tl.load(inputs + k0, mask=real[:, None] & (k[None, :] < H - k0), other=0.0)
        row32 = row.to(tl.float32)[:, None, :]
        acc += w.to(tl.float32)[None, :, :] * row32
        if GATED:
            acc_up += v.to(tl.float32)[None, :, :] * row32
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        z = tl.sum(acc_up, axis=2)
        if HAS_BIAS:
            z += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y = activate_gated(y, z, ACT)
    inside = real[:, None] & (n[None, :] < N)
    to = out + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=inside)
