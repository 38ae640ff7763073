"""The launch of `roles_kernels`: a second product of little depth, by warps with roles.

Shape letters: E experts, H hidden, I intermediate, R rows in expert order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moetor.kernels.triton import support
from moetor.kernels.triton.choose import ROLE_ROWS, ROLE_TILE, Tile, cdiv, tma_allowed
from moetor.kernels.triton.sort import RowTiles

# Of a thread that multiplies and of one that loads; all of them begin with the last number.
_REGISTERS = (208, 88, 168)


def can_have_roles(act_RI: Tensor, down_EHI: Tensor, tile: Tile) -> bool:
    """Whether the tile is one for warps with roles, and all operands can be described."""
    hidden, depth = down_EHI.shape[1:]
    size = act_RI.element_size()
    return (
        (tile.rows, tile.columns, tile.depth) == ROLE_TILE
        and size == 2
        and hidden * size % 16 == 0
        and tma_allowed(
            tile,
            contiguous=down_EHI.is_contiguous(),
            address=down_EHI.data_ptr(),
            inner=depth,
            depth=depth,
            transposed=False,
            itemsize=size,
        )
    )


def launch_down_by_roles(
    act_RI: Tensor, down_EHI: Tensor, made: RowTiles, tile: Tile, out_RH: Tensor, *, pdl: bool
) -> None:
    """The second product, where `can_have_roles`; rows of a tile's upper half are left as they are
    where all of them are padding."""
    from moetor.kernels.triton import roles_kernels

    hidden, depth = down_EHI.shape[1:]
    programs = min(made.tiles * cdiv(hidden, tile.columns), tile.persistent)
    roles_kernels.down_by_roles[(programs,)](
        _described(act_RI, ROLE_ROWS, tile.depth),
        _described(down_EHI.view(-1, depth), tile.columns, tile.depth),
        _described(out_RH, ROLE_ROWS, ROLE_ROWS),
        made.order,
        made.expert,
        made.used,
        made.place.numel(),
        H=hidden,
        I=depth,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=tile.group,
        STAGES=tile.stages,
        MULTIPLIER_REGISTERS=_REGISTERS[0],
        LOADER_REGISTERS=_REGISTERS[1],
        PDL=pdl,
        num_warps=4,
        maxnreg=_REGISTERS[2],
        **support.chained(pdl),
    )


def _described(tensor: Tensor, rows: int, columns: int) -> Any:
    """As `support.described`, with the boxes' layout in shared memory."""
    from triton.experimental.gluon.language import (  # type: ignore[import-not-found, unused-ignore]
        NVMMASharedLayout,
    )
    from triton.experimental.gluon.nvidia.hopper import (  # type: ignore[import-not-found, unused-ignore]
        TensorDescriptor,
    )

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)
