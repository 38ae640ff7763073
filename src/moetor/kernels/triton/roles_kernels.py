"""A second product of little depth by warps with roles: one loads, two groups of four multiply 64
rows of a tile each (compute capability 9.0).

With a depth of some hundreds a tile's end is a large part of its time. Here one group stores its
rows while the other one still multiplies, and loading goes on for the next tile. A tile whose
upper half is padding keeps one group busy.

Written in Gluon, Triton's lower level, whose interface changes between versions: for Triton 3.6
(`support.have_roles`).

Shape letters: E experts, H hidden, I intermediate, R rows in expert order; BN columns and BK depth
of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from triton.experimental import gluon  # type: ignore[import-not-found, unused-ignore]
from triton.experimental.gluon import (  # type: ignore[import-not-found, unused-ignore]
    language as gl,
)
from triton.experimental.gluon.language.nvidia.hopper import (  # type: ignore[import-not-found, unused-ignore]
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moetor.kernels.triton.device_code import chain
from moetor.kernels.triton.large_kernels import swizzle

_HALF = gl.constexpr(64)  # rows of a group, and columns of a store
_BM = gl.constexpr(128)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage after this one; its barriers' phase turns when the ring begins anew."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    """The stage before this one. (A loop that carries it from step to step would not: Triton takes
    two names that begin as one value for one.)"""
    return gl.where(stage == 0, STAGES, stage) - 1


@gluon.jit
def _load(
    act,
    weight,
    order,
    tile_expert,
    used,
    slots,
    a_lower,
    a_upper,
    b,
    ready,
    empty,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills stages, tile after tile, as they become empty."""
    BLOCKS: gl.constexpr = (H + BN - 1) // BN
    B_BYTES: gl.constexpr = BN * BK * 2
    A_BYTES: gl.constexpr = _HALF * BK * 2
    tiles = gl.load(used)
    stage = 0
    phase = 0
    for pid in range(gl.program_id(0), tiles * BLOCKS, gl.num_programs(0)):
        tile, block = swizzle(pid, tiles, BLOCKS, GROUP)
        expert = gl.load(tile_expert + tile)
        row = tile * _BM
        full = gl.load(order + row + _HALF) < slots
        for k in range(0, I, BK):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            filled = ready.index(stage)
            mbarrier.expect(filled, B_BYTES + 2 * A_BYTES, pred=full)
            mbarrier.expect(filled, B_BYTES + A_BYTES, pred=full == 0)
            tma.async_copy_global_to_shared(act, [row, k], filled, a_lower.index(stage))
            tma.async_copy_global_to_shared(
                act, [row + _HALF, k], filled, a_upper.index(stage), pred=full
            )
            # Past an expert's last column lie its neighbour's; those are never stored.
            tma.async_copy_global_to_shared(
                weight, [expert * H + block * BN, k], filled, b.index(stage)
            )
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns; no value moves between threads."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def _store(out, row, column, value, room, NUMBER: gl.constexpr):
    """Columns to memory through shared memory, once the store before the last has read its own."""
    tma.store_wait(1)
    place = room.index(NUMBER % 2)
    place.store(value.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], place)


@gluon.jit
def _multiply(
    out,
    order,
    used,
    slots,
    a,
    b,
    ready,
    empty,
    room,
    UPPER: gl.constexpr,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out[64 rows, BN columns] = act[rows] @ W2[expert].T of each tile's lower or upper half."""
    BLOCKS: gl.constexpr = (H + BN - 1) // BN
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    tiles = gl.load(used)
    stage = 0
    phase = 0
    for pid in range(gl.program_id(0), tiles * BLOCKS, gl.num_programs(0)):
        tile, block = swizzle(pid, tiles, BLOCKS, GROUP)
        row = tile * _BM + (_HALF if UPPER else 0)
        if UPPER:
            works = gl.load(order + row) < slots
        else:
            works = tile >= 0
        if works:
            acc = gl.zeros([_HALF, BN], gl.float32, layout)
            for k in range(0, I, BK):
                mbarrier.wait(ready.index(stage), phase)
                weights = b.index(stage).permute((1, 0))
                acc = warpgroup_mma(a.index(stage), weights, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1, pred=k > 0)
                stage, phase = _next(stage, phase, STAGES)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1)
            column = block * BN
            left, right = _halves(acc)
            first, second = _halves(left)
            _store(out, row, column, first, room, 0)
            _store(out, row, column + _HALF, second, room, 1)
            first, second = _halves(right)
            _store(out, row, column + 2 * _HALF, first, room, 0)
            _store(out, row, column + 3 * _HALF, second, room, 1)
        else:
            for _ in range(0, I, BK):
                mbarrier.wait(ready.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["slots"])
def down_by_roles(
    act,
    weight,
    out,
    order,
    tile_expert,
    used,
    slots,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLIER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """out[row] = act[row] @ W2[expert].T for rows [R, I] and weights [E * H, I], all through tensor
    descriptors. BN is 256: four stores of 64 columns."""
    gl.static_assert(BN == 4 * _HALF)
    dtype: gl.constexpr = weight.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_lower = gl.allocate_shared_memory(dtype, [STAGES, _HALF, BK], shared)
    a_upper = gl.allocate_shared_memory(dtype, [STAGES, _HALF, BK], shared)
    b = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], shared)
    room_lower = gl.allocate_shared_memory(dtype, [2, _HALF, _HALF], shared)
    room_upper = gl.allocate_shared_memory(dtype, [2, _HALF, _HALF], shared)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    chain(PDL)
    # The tuples stand in the call itself: Triton makes tensors of the constants in others.
    gl.warp_specialize(
        [
            (
                _multiply,
                (out, order, used, slots, a_lower, b, ready, empty, room_lower, False, H, I, BN,
                 BK, GROUP, STAGES),
            ),
            (
                _multiply,
                (out, order, used, slots, a_upper, b, ready, empty, room_upper, True, H, I, BN,
                 BK, GROUP, STAGES),
            ),
            (
                _load,
                (act, weight, order, tile_expert, used, slots, a_lower, a_upper, b, ready, empty,
                 H, I, BN, BK, GROUP, STAGES),
            ),
        ],
        [4, 1],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
