"""What `fuse` did, block by block, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moetor.kernels.select import Refusal
from moetor.layer.offload import MemoryPlan
from moetor.parallel.eplb.balancer import ExpertBalancer
from moetor.parallel.groups import ParallelGroups

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
        num_experts: routed experts of the block; 0 where they are not packed and were not counted.
        quantization: name of the experts' quantisation, None where their weights are as they were.
        quantization_error: norm of the deviation that quantising made in the routed output on
            random input, over the norm of that output.
        expert_bytes: of the experts' weights, as they were and as they are.
        kernel_note: what the kernel says of how it runs the block, such as being tuned; or None.
        packed_bytes: of expert weights that were copied into packed tensors, because the block
            holds each expert apart; 0 where its own tensors are used.
    """

    name: str
    family_block: str
    level: Level
    router: str = ""
    kernel: str | None = None
    reason: str = ""
    max_error: float | None = None
    refusals: tuple[Refusal, ...] = ()
    num_experts: int = 0
    quantization: str | None = None
    quantization_error: float | None = None
    expert_bytes: tuple[int, int] | None = None
    kernel_note: str | None = None
    packed_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpreadBlock:
    """One MoE block on this rank.

    Attributes:
        name: path of the module.
        experts: what this rank holds of the routed experts.
        shared: `split`, `whole` on every rank, or empty where there are none.
        dispatcher: class name of what brings tokens to experts.
        reason: why it is not split as the configuration usually means.
    """

    name: str
    experts: str
    shared: str = ""
    dispatcher: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelReport:
    """What `parallelize` did on this rank. `print` it for a table.

    Attributes:
        groups: this rank's place among the ranks.
        blocks: the MoE blocks.
        styles: how many dense modules were split in each style of Transformers' plan.
        whole: kinds of linear layers outside of MoE blocks that every rank has whole.
        left: those that the plan names and that stay whole all the same, with the reason.
        balancer: moves experts after every forward pass, under EPLB.
    """

    groups: ParallelGroups
    blocks: list[SpreadBlock]
    styles: Counter[str] = field(default_factory=Counter)
    whole: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    balancer: ExpertBalancer | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {
            "rank": self.groups.rank,
            "config": asdict(self.groups.config),
            "not_direct": self.groups.not_direct,
            "blocks": [asdict(block) for block in self.blocks],
            "styles": dict(self.styles),
            "whole": list(self.whole),
            "left": self.left,
        }

    def __str__(self) -> str:
        config = self.groups.config
        lines = [
            f"rank {self.groups.rank} of {config.world_size}: tensor parallel "
            f"{config.tensor_parallel_size}, data parallel {config.data_parallel_size}"
        ]
        refused = self.groups.not_direct
        lines.append(f"collectives: {'direct' if refused is None else f'the backend ({refused})'}")
        for block in self.blocks:
            shared = f", shared experts {block.shared}" if block.shared else ""
            reason = f" ({block.reason})" if block.reason else ""
            lines.append(f"{block.name}: {block.experts}{shared}{reason}")
        split = ", ".join(f"{count} {style}" for style, count in self.styles.items())
        lines.append(f"dense modules split: {split or 'none'}")
        if self.whole:
            lines.append(f"whole on every rank: {', '.join(self.whole)}")
        lines += [f"{name} stays whole: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


DenseKind = Literal["model", "split", "norm", "product", "mlp", "attention", "layer", "rows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseReport:
    """A part around the experts.

    Attributes:
        name: path of the module, or of the modules that share a product.
        kind: `norm`, `product` (linear modules with one input), `mlp` (gate, up and activation),
            `attention` (head norms, rotary positions and cache write), `layer` (its sums with the
            norms after them), `rows` (a linear module for few rows), `split` (a module that
            Transformers' plan has split, as a product of local tensors), `model` (nothing could be
            tried).
        done: whether it was fused.
        reason: why not.
    """

    name: str
    kind: DenseKind
    done: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FusionReport:
    """All MoE blocks of a model, in the order of its modules. `print` it for a table.

    Attributes:
        blocks: one by one.
        parallel: how the model was spread over ranks, where it was.
        weight_bytes: of all the model's weights, as `explain` predicts them (of a quantised
            checkpoint: of its files); None after `fuse`.
        dense: what was fused around the experts, where it was asked for.
        offload: what is in host memory and on the GPU, where experts were kept in host memory.
    """

    blocks: list[BlockReport]
    parallel: ParallelReport | None = None
    weight_bytes: int | None = None
    dense: list[DenseReport] = field(default_factory=list)
    offload: MemoryPlan | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in use, each once."""
        return tuple(dict.fromkeys(block.kernel for block in self.blocks if block.kernel))

    def count(self, level: Level) -> int:
        """Number of blocks at this level."""
        return sum(block.level == level for block in self.blocks)

    @property
    def quantized(self) -> str | None:
        """How many experts were quantised and what it saved, in one line; None where none was
        asked for.
        """
        done = [block for block in self.blocks if block.quantization is not None]
        if not done:
            return None
        total = sum(block.num_experts for block in self.blocks)
        names = ", ".join(dict.fromkeys(str(block.quantization) for block in done))
        line = f"experts: {sum(block.num_experts for block in done)} of {total} quantised ({names})"
        sizes = [block.expert_bytes for block in done if block.expert_bytes is not None]
        if not sizes:
            return line
        before, after = (sum(pair[place] for pair in sizes) / 2**30 for place in (0, 1))
        return f"{line}, {before:.3g} -> {after:.3g} GiB"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        told: dict[str, Any] = {
            "kernels": list(self.kernels),
            "quantized": self.quantized,
            "weight_bytes": self.weight_bytes,
            "blocks": [asdict(block) for block in self.blocks],
        }
        if self.parallel is not None:
            told["parallel"] = self.parallel.to_dict()
        if self.offload is not None:
            told["offload"] = asdict(self.offload)
        if self.dense:
            told["dense"] = [asdict(part) for part in self.dense]
        return told

    def dense_lines(self) -> list[str]:
        """What was fused around the experts: a line for all, and one for each reason."""
        if not self.dense:
            return []
        done = Counter(part.kind for part in self.dense if part.done)
        counts = ", ".join(f"{count} x {kind}" for kind, count in done.items()) or "nothing"
        left = Counter((part.kind, part.reason) for part in self.dense if not part.done)
        return [f"around the experts: {counts}"] + [
            f"{count} x {kind} left alone: {reason}" for (kind, reason), count in left.items()
        ]

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
        said = {block.kernel_note: block.kernel for block in self.blocks if block.kernel_note}
        notes += [f"kernel {kernel} is {note}" for note, kernel in said.items()]
        packed = [block.packed_bytes for block in self.blocks if block.packed_bytes]
        if packed:
            notes.append(
                f"experts of {len(packed)} blocks packed once, {sum(packed) / 2**20:,.1f} MiB: "
                "state_dict and save_pretrained keep their own names, named_parameters has the "
                "packed ones"
            )
        if self.parallel is not None:
            notes.append(str(self.parallel))
        notes += [] if self.quantized is None else [self.quantized]
        notes += [] if self.offload is None else self.offload.lines()
        return "\n".join(
            [
                *(line.rstrip() for line in lines),
                f"{len(self.blocks)} MoE blocks: {total}",
                *notes,
                *self.dense_lines(),
            ]
        )
