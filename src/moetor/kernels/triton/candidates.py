"""Plans around a chosen one, a few dozen at most: what measuring may find to be faster. Imports no
Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moetor.kernels.triton.choose import Device, LargePlan, SmallPlan, Tile, VectorTile

# (rows, depth, warps, stages) of the vector products over rows of the weight.
_UP = ((1, 512, 1, 1), (2, 256, 1, 1), (2, 512, 1, 1), (2, 1024, 2, 1), (2, 1024, 4, 1),
       (1, 2048, 4, 1), (4, 256, 2, 1), (8, 256, 4, 1))  # fmt: skip
_DOWN = ((2, 128, 2, 1), (2, 256, 1, 1), (2, 256, 4, 1), (4, 128, 4, 1), (8, 128, 4, 1),
         (8, 128, 8, 1), (4, 256, 2, 1), (8, 512, 4, 1))  # fmt: skip


def small_candidates(plan: SmallPlan, *, transposed: bool) -> Iterator[tuple[str, SmallPlan]]:
    """Other tiles of the small path, each with a name that says what differs.

    Args:
        transposed: the weights' storage, which has tiles of another kind.
    """
    if plan.pdl:
        yield "unchained", replace(plan, pdl=False)
    if transposed:
        for parts, columns, depth in ((2, 64, 128), (4, 64, 64), (4, 64, 128), (8, 32, 128)):
            down = replace(plan.down, rows=columns, depth=depth)
            if (parts, down) != (plan.parts, plan.down):
                changed = replace(plan, parts=parts, down=down)
                yield f"down {parts} parts {columns}x{depth}", changed
        return
    for rows, depth, warps, stages in _UP:
        tile = VectorTile(rows=rows, depth=depth, warps=warps, stages=stages)
        if tile != plan.up:
            yield f"up {rows}x{depth} w{warps} s{stages}", replace(plan, up=tile)
    for rows, depth, warps, stages in _DOWN:
        tile = VectorTile(rows=rows, depth=depth, warps=warps, stages=stages)
        if tile != plan.down:
            yield f"down {rows}x{depth} w{warps} s{stages}", replace(plan, down=tile)


def large_candidates(
    plan: LargePlan, device: Device, *, gated: bool, itemsize: int
) -> Iterator[tuple[str, LargePlan]]:
    """The chosen tiles with one thing changed; none needs more shared memory than there is."""
    for name, changed in _large_changes(plan, device):
        needed = (
            changed.up.shared_bytes(
                width=(2 if gated else 1) * changed.up.columns, itemsize=itemsize, first=True
            ),
            changed.down.shared_bytes(width=changed.down.columns, itemsize=itemsize, first=False),
        )
        if changed != plan and max(needed) <= device.shared:
            yield name, changed


def _large_changes(plan: LargePlan, device: Device) -> Iterator[tuple[str, LargePlan]]:
    def both(**changes: Any) -> LargePlan:
        up, down = replace(plan.up, **changes), replace(plan.down, **changes)
        return replace(plan, up=up, down=down)

    if plan.down.roles:
        plan = replace(plan, down=plan.down.without_roles())
        yield "no roles", plan
    rows = plan.up.rows
    for other in (rows // 2, rows * 2):
        if 16 <= other <= 128:
            yield f"BM{other}", both(rows=other)
    describes = device.capability >= (9, 0)
    if describes:
        yield f"tma={not plan.up.tma}", both(tma=not plan.up.tma)
    yield "group 1", both(group=1)
    yield "group 32", both(group=32)
    yield "stages-1", both(stages=max(1, plan.up.stages - 1))
    if rows <= 32:
        yield "stages+2", both(stages=plan.up.stages + 2)
        yield "BK64 s6", both(depth=64, stages=6)
        yield "BN*2", replace(plan, up=_wider(plan.up), down=_wider(plan.down))
    if rows == 128:
        yield "BN/2 w4", replace(plan, up=_narrower(plan.up), down=_narrower(plan.down))
        yield "down BN128", replace(plan, down=replace(plan.down, columns=128))
        many = 0 if plan.down.persistent else device.sms
        yield f"down persistent={many}", replace(plan, down=replace(plan.down, persistent=many))
        if describes:
            walk = 0 if plan.up.persistent else device.sms
            walking = replace(plan.up, persistent=walk, halves=not walk)
            yield f"up persistent={walk}", replace(plan, up=walking)


def _wider(tile: Tile) -> Tile:
    return replace(tile, columns=2 * tile.columns, stages=3)


def _narrower(tile: Tile) -> Tile:
    return replace(tile, columns=max(16, tile.columns // 2), warps=4)
