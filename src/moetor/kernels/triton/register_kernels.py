"""Products of the path for many tokens by numbers, on Hopper's warpgroup instructions, whose first
operand may come from registers.

A product is computed transposed, out.T = W @ x.T: a thread turns the codes that it holds into
numbers where the instruction takes them, so that no number of a weight is ever stored. Rows of the
input come from shared memory. A program has two blocks of 64 rows of a weight (gate and up, or
neighbours), of which each warp takes 8 and 8, so that a gate and its up row end in one thread, and
BM rows of the input.

FORM is that of `quantized_product_kernels.py`, with the arithmetic `numbers`. This is Gluon, in
which a program says which thread holds what; `large_quantized_kernels.py` is the twin in plain
Triton for all other GPUs, dtypes and alignments.

Shape letters: E experts; N outputs and D depth of a product, G groups in a row; BM rows of the
input, BK depth of a step, BW bytes of codes of a step.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from triton.experimental import gluon  # type: ignore[import-not-found, unused-ignore]
from triton.experimental.gluon import (  # type: ignore[import-not-found, unused-ignore]
    language as gl,
)
from triton.experimental.gluon.language.nvidia.hopper import (  # type: ignore[import-not-found, unused-ignore]
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from moetor.kernels.triton.device_code import activate_gated, activate_ungated, chain
from moetor.kernels.triton.large_kernels import swizzle
from moetor.kernels.triton.register_code import (
    BLOCK,
    codes_layout,
    columns,
    factors,
    groups_in,
    halves_of,
    numbers_of,
    read_scales,
    scales_layout,
)


@gluon.constexpr_function
def sums_layout(rows):
    """Of [128, rows] sums in a warpgroup."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, rows, 16]
    )


@gluon.jit
def _fetch(
    x, w, memory, stage, step, place, N: gl.constexpr, APART: gl.constexpr, BK: gl.constexpr,
    BW: gl.constexpr,
):  # fmt: skip
    """Asks for the operands of a step of the tile at `place`: rows of x, and both blocks' codes."""
    x_stages, w_stages, w_stages_2, barriers = memory
    barrier = barriers.index(stage)
    mbarrier.expect(barrier, x.block_type.nbytes + 2 * w.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [place[0], step * BK], barrier, x_stages.index(stage))
    row = place[1] * N + place[2]
    tma.async_copy_global_to_shared(w, [row, step * BW], barrier, w_stages.index(stage))
    tma.async_copy_global_to_shared(w, [row + APART, step * BW], barrier, w_stages_2.index(stage))


@gluon.jit
def _operand(value, value_2, LAYOUT: gl.constexpr):
    """[128, 16] of both blocks' [64, 16]; nothing moves between threads."""
    both = gl.reshape(gl.join(value, value_2), (8, 8, 16, 2))
    return gl.convert_layout(
        gl.reshape(gl.permute(both, (0, 3, 1, 2)), (128, 16)), LAYOUT, assert_trivial=True
    )


@gluon.jit
def _multiply(
    codes, codes_2, x, acc, f, f_2, z, z_2, FORM: gl.constexpr, COUNT: gl.constexpr,
    BK: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """acc + a step's product, under way when this returns."""
    CODES: gl.constexpr = codes_layout()
    for i in gl.static_range(0, BK, 32):
        ff = (f[i * COUNT // BK], f[(i + 16) * COUNT // BK])
        ff_2 = (f_2[i * COUNT // BK], f_2[(i + 16) * COUNT // BK])
        if FORM[1] == "int4" or FORM[1] == "e2m1":
            # A group of 16 is one half of 16 bytes.
            zz = (z[i * COUNT // BK], z[(i + 16) * COUNT // BK])
            low, high = halves_of(codes.slice(i // 2, 16, dim=1).load(CODES), ff, zz, FORM)
            zz = (z_2[i * COUNT // BK], z_2[(i + 16) * COUNT // BK])
            low_2, high_2 = halves_of(codes_2.slice(i // 2, 16, dim=1).load(CODES), ff_2, zz, FORM)
        else:
            low = numbers_of(codes.slice(i, 16, dim=1).load(CODES), ff[0], FORM)
            low_2 = numbers_of(codes_2.slice(i, 16, dim=1).load(CODES), ff_2[0], FORM)
            high = numbers_of(codes.slice(i + 16, 16, dim=1).load(CODES), ff[1], FORM)
            high_2 = numbers_of(codes_2.slice(i + 16, 16, dim=1).load(CODES), ff_2[1], FORM)
        a = _operand(low, low_2, DOT)
        acc = warpgroup_mma(a, x.slice(i, 16, dim=0), acc, is_async=True)
        a = _operand(high, high_2, DOT)
        acc = warpgroup_mma(a, x.slice(i + 16, 16, dim=0), acc, is_async=True)
    return acc


@gluon.jit
def _accumulate(
    x, w, scales, zeros, place, memory, N: gl.constexpr, D: gl.constexpr, APART: gl.constexpr,
    FORM: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both blocks' rows of W @ x[BM rows].T, [64, BM] each."""
    BW: gl.constexpr = BK // 2 if FORM[1] == "int4" or FORM[1] == "e2m1" else BK
    G: gl.constexpr = groups_in(FORM, D)
    COUNT: gl.constexpr = 1 if FORM[4] == 0 or FORM[4] > BK else BK // FORM[4]
    STEPS: gl.constexpr = (D + BK - 1) // BK
    SUMS: gl.constexpr = sums_layout(BM)
    DOT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, codes_layout())
    OWN: gl.constexpr = scales_layout(COUNT)
    _, expert, column = place
    x_stages, w_stages, w_stages_2, barriers = memory
    for step in gl.static_range(STAGES - 1):
        _fetch(x, w, memory, step, step, place, N, APART, BK, BW)
    acc = warpgroup_mma_init(gl.zeros((2 * BLOCK, BM), gl.float32, SUMS))
    if FORM[4] != 0:
        stored = read_scales(scales, expert, column, 0, FORM, N, G, COUNT, BK, OWN)
        stored_2 = read_scales(scales, expert, column + APART, 0, FORM, N, G, COUNT, BK, OWN)
    for step in range(STEPS):
        if FORM[4] != 0:
            f = columns(factors(stored, FORM), COUNT, ROWS)
            f_2 = columns(factors(stored_2, FORM), COUNT, ROWS)
            z = f
            z_2 = f_2
            # The next step's are under way during this one.
            then = gl.minimum(step + 1, STEPS - 1)
            stored = read_scales(scales, expert, column, then, FORM, N, G, COUNT, BK, OWN)
            stored_2 = read_scales(scales, expert, column + APART, then, FORM, N, G, COUNT, BK, OWN)
        else:
            f = (gl.full((BLOCK,), 1.0, gl.bfloat16, ROWS),)
            f_2 = f
            z = f
            z_2 = f
        if FORM[5]:
            zero = read_scales(zeros, expert, column, step, FORM, N, G, COUNT, BK, OWN)
            z = columns(zero.to(gl.float32), COUNT, ROWS)
            zero = read_scales(zeros, expert, column + APART, step, FORM, N, G, COUNT, BK, OWN)
            z_2 = columns(zero.to(gl.float32), COUNT, ROWS)
        stage = step % STAGES
        mbarrier.wait(barriers.index(stage), (step // STAGES) & 1)
        # The products of the step before read their numbers from registers until they are over:
        # only then may others be made. The program's neighbour on the multiprocessor multiplies
        # meanwhile.
        acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(acc,)))
        # In all warps: that step's memory is free.
        gl.thread_barrier()
        later = step + STAGES - 1
        if later < STEPS:
            _fetch(x, w, memory, later % STAGES, later, place, N, APART, BK, BW)
        rows = x_stages.index(stage)
        if x.block_type.shape[0] > BM:
            rows = rows.slice(0, BM, dim=0)
        acc = _multiply(
            w_stages.index(stage), w_stages_2.index(stage), rows.permute((1, 0)), acc,
            f, f_2, z, z_2, FORM, COUNT, BK, DOT,
        )  # fmt: skip
    sums = gl.reshape(warpgroup_mma_wait(0, deps=(acc,)), (8, 2, 8, BM))
    return gl.split(gl.reshape(gl.permute(sums, (0, 2, 3, 1)), (BLOCK, BM, 2)))


@gluon.jit
def _store(value, out, row0, column0, LAST: gl.constexpr, BM: gl.constexpr):
    """out[rows, columns] = value [64 columns, BM rows], transposed, in full lines."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = gl.convert_layout(value.to(out.dtype.element_ty).trans(), LINES)
    row = row0 + gl.arange(0, BM, gl.SliceLayout(1, LINES))
    n = column0 + gl.arange(0, BLOCK, gl.SliceLayout(0, LINES))
    at = out + row.to(gl.int64)[:, None] * LAST + n[None, :]
    gl.store(at, tile, mask=(n < LAST)[None, :])


@gluon.jit
def _tile(
    x, w, scales, zeros, row_scales, bias, topk_weights, out, order, slots, place, memory,
    N: gl.constexpr, D: gl.constexpr, LAST: gl.constexpr, GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, ACT: gl.constexpr, FORM: gl.constexpr,
    BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[BM rows, a block of columns] = act(x[rows] @ W[expert, columns].T)."""
    APART: gl.constexpr = LAST if GATED else BLOCK
    row0, expert, column0 = place
    acc, acc_2 = _accumulate(x, w, scales, zeros, place, memory, N, D, APART, FORM, BM, BK, STAGES)
    OWN: gl.constexpr = acc.type.layout
    n = column0 + gl.arange(0, BLOCK, gl.SliceLayout(1, OWN))
    n_2 = n + APART
    here = expert.to(gl.int64) * N
    if FORM[2] != "float":
        acc *= 4294967296.0  # see `_factors`
        acc_2 *= 4294967296.0
    if FORM[4] == 0 or FORM[2] == "e4m3":
        # The scale of a whole row of the weight, or the second one of nvfp4.
        acc *= gl.load(row_scales + here + n, mask=n < N, other=0.0)[:, None]
        acc_2 *= gl.load(row_scales + here + n_2, mask=n_2 < N, other=0.0)[:, None]
    if WEIGHT_ON_INPUT:
        slot = gl.load(order + row0 + gl.arange(0, BM, gl.SliceLayout(0, OWN)))
        weight = gl.load(topk_weights + slot, mask=slot < slots, other=0.0)[None, :]
        acc *= weight
        acc_2 *= weight
    if HAS_BIAS:
        acc += gl.load(bias + here + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        acc_2 += gl.load(bias + here + n_2, mask=n_2 < N, other=0.0).to(gl.float32)[:, None]
    if GATED:
        _store(activate_gated(acc, acc_2, ACT), out, row0, column0, LAST, BM)
    else:
        _store(activate_ungated(acc, ACT), out, row0, column0, LAST, BM)
        _store(activate_ungated(acc_2, ACT), out, row0, column0 + BLOCK, LAST, BM)


@gluon.jit(do_not_specialize=["slots"])
def register_product(
    x,
    w,
    scales,
    zeros,
    row_scales,
    bias,
    topk_weights,
    out,
    order,
    tile_expert,
    used,
    slots,
    N: gl.constexpr,
    D: gl.constexpr,
    LAST: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr,
    ACT: gl.constexpr,
    FORM: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PDL: gl.constexpr,
):
    """out[row, a block of columns] = act(x[row] @ W[expert, columns].T), rows in expert order.

    A tile whose upper half is padding computes its lower half alone.

    Args:
        x: descriptor of [BM, BK] boxes over [R, D].
        w: descriptor of [64, BW] boxes over the codes [E * N, .].
        LAST: columns of `out`, half of N where gated.
        STAGES: steps in shared memory at once, at most one more than D has.
    """
    chain(PDL)
    BW: gl.constexpr = BK // 2 if FORM[1] == "int4" or FORM[1] == "e2m1" else BK
    WIDTH: gl.constexpr = BLOCK if GATED else 2 * BLOCK
    BLOCKS: gl.constexpr = (LAST + WIDTH - 1) // WIDTH
    gl.static_assert((D + BK - 1) // BK >= STAGES - 1)
    tiles = gl.load(used)
    if gl.program_id(0) >= tiles * BLOCKS:
        return
    tile, block = swizzle(gl.program_id(0), tiles, BLOCKS, GROUP)
    place = (tile * BM, gl.load(tile_expert + tile), block * WIDTH)
    x_stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], x.layout)
    w_stages = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK, BW], w.layout)
    w_stages_2 = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK, BW], w.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    memory = (x_stages, w_stages, w_stages_2, barriers)
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=1)
    fence_async_shared()
    if gl.load(order + tile * BM + BM // 2) >= slots:
        _tile(
            x, w, scales, zeros, row_scales, bias, topk_weights, out, order, slots, place, memory,
            N, D, LAST, GATED, HAS_BIAS, WEIGHT_ON_INPUT, ACT, FORM, BM // 2, BK, STAGES,
        )  # fmt: skip
    else:
        _tile(
            x, w, scales, zeros, row_scales, bias, topk_weights, out, order, slots, place, memory,
            N, D, LAST, GATED, HAS_BIAS, WEIGHT_ON_INPUT, ACT, FORM, BM, BK, STAGES,
        )  # fmt: skip
