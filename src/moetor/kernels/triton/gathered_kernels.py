"""Two launches ahead of the second product: tokens copied to the rows of their slots, and the first
product as programs that walk over tiles.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, R rows in expert order; BM
rows, BN columns and BK depth of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from moetor.kernels.triton.device_code import chain
from moetor.kernels.triton.large_kernels import finish, swizzle


@triton.jit(do_not_specialize=["tokens", "slots"])
def copy_rows(
    hidden,
    order,
    place,
    used,
    rows,
    tokens,
    slots,
    K: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[place of slot] = hidden[token of slot], and zeros in padding rows.

    Program p reads token p once and writes it K times; those after the tokens look after one tile's
    padding each.
    """
    chain(PDL)
    pid = tl.program_id(0)
    h = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = h < H
    if pid < tokens:
        token = pid.to(tl.int64)
        x = tl.load(hidden + token * H + h, mask=inside, other=0.0)
        for k in tl.static_range(K):
            row = tl.load(place + token * K + k)
            tl.store(rows + row.to(tl.int64) * H + h, x, mask=inside & (row >= 0))
    else:
        tile = pid - tokens
        # Most tiles have no padding; those that have any have it at the end.
        if tile < tl.load(used):
            row = tile * BM + BM - 1
            while row >= tile * BM:
                if tl.load(order + row) >= slots:
                    nothing = tl.zeros((BN,), rows.dtype.element_ty)
                    tl.store(rows + row.to(tl.int64) * H + h, nothing, mask=inside)
                    row -= 1
                else:
                    row = -1


@triton.jit(do_not_specialize=["slots"])
def walk_up(
    rows,
    weight,
    bias,
    topk_weights,
    act,
    order,
    tile_expert,
    used,
    slots,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """act[row, BN columns] = activation(rows[row] @ W1[expert].T).

    Gate and up columns are one operand, so one product. The loop over tiles and the one over the
    depth are one loop to the compiler: the next tile's operands are under way while this one's
    activation is computed and stored.
    """
    BLOCKS: tl.constexpr = (I + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * BN if GATED else BN
    tiles = tl.load(used)
    for pid in tl.range(tl.program_id(0), tiles * BLOCKS, tl.num_programs(0), flatten=True):
        tile, block = swizzle(pid, tiles, BLOCKS, GROUP)
        expert = tl.load(tile_expert + tile)
        acc = tl.zeros((BM, WIDTH), tl.float32)
        for k0 in range(0, H, BK):
            a = rows.load([tile * BM, k0])
            if TRANSPOSED:
                b = weight.load([expert * H + k0, block * WIDTH])
            elif GATED and not INTERLEAVED:
                b = weight.load([expert * 2, block * BN, k0]).reshape(WIDTH, BK).T
            else:
                b = weight.load([expert, block * WIDTH, k0]).reshape(WIDTH, BK).T
            acc = tl.dot(a, b, acc)
        if HAS_BIAS or WEIGHT_ON_INPUT:
            slot = tl.load(order + tile * BM + tl.arange(0, BM))
            real = slot < slots
        if WEIGHT_ON_INPUT:
            # W (w x) = w (W x): the weight is applied to the float32 sum.
            acc = acc * tl.load(topk_weights + slot, mask=real, other=0.0)[:, None]
        out = finish(acc, bias, expert, block, I, GATED, INTERLEAVED, HAS_BIAS, ACT, BM, BN)
        if HAS_BIAS:
            out = tl.where(real[:, None], out, 0.0)
        act.store([tile * BM, block * BN], out.to(act.dtype))
