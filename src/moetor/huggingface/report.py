"""What `fuse` did, block by block, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from moetor.kernels.select import Refusal

Level = Literal["block", "experts", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReport:
    """One MoE block.

    Attributes:
        name: path of the module in the model.
        family_block: class name of the original module.
        level: `block` (the whole block is one `MoELayer`), `experts` (its experts alone), `none`
            (left as it was).
        router: the recognised routing, or what routes instead.
        kernel: name of the kernel that runs the experts, None at level `none`.
        reason: why the level is not `block`; empty when it is.
        max_error: largest deviation from the original on random input, relative to its largest
            output; None where nothing was compared.
        refusals: the preferred kernels that do not run here, with their reasons.
    """

    name: str
    family_block: str
    level: Level
    router: str = ""
    kernel: str | None = None
    reason: str = ""
    max_error: float | None = None
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class FusionReport:
    """All MoE blocks of a model, in the order of its modules. `print` it for a table."""

    blocks: list[BlockReport]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in use, each once."""
        return tuple(dict.fromkeys(block.kernel for block in self.blocks if block.kernel))

    def count(self, level: Level) -> int:
        """Number of blocks at this level."""
        return sum(block.level == level for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {"kernels": list(self.kernels), "blocks": [asdict(block) for block in self.blocks]}

    def __str__(self) -> str:
        head = ("block", "class", "level", "kernel", "max error", "routing", "reason")
        rows = [head]
        for block in self.blocks:
            error = "" if block.max_error is None else f"{block.max_error:.1e}"
            rows.append(
                (
                    block.name,
                    block.family_block,
                    block.level,
                    block.kernel or "-",
                    error,
                    block.router,
                    block.reason,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        ]
        total = ", ".join(
            f"{self.count(level)} at level {level}"
            for level in ("block", "experts", "none")
            if self.count(level)
        )
        refused = dict.fromkeys(refusal for block in self.blocks for refusal in block.refusals)
        notes = [f"kernel {item.kernel} not used: it {item.reason}" for item in refused]
        return "\n".join(
            [*(line.rstrip() for line in lines), f"{len(self.blocks)} MoE blocks: {total}", *notes]
        )
