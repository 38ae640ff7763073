"""Experts over several ranks: each rank reads the part that it keeps, and nothing else.

The experts' matrices are left out at first; stand-ins without memory take their places while the
model is fused, proved with random weights, and spread. Then every rank knows its share, and reads
it into the tensors that spreading has made. Shape letters: E experts, S slots of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moetor.config import ExpertsConfig
from moetor.errors import FusionError
from moetor.huggingface.checkpoint import CheckpointReader
from moetor.huggingface.layout import Layout
from moetor.huggingface.load_steps import LoadPlan, Streamed
from moetor.huggingface.modules import FusedMoEBlock, fused_modules
from moetor.huggingface.quantized_loading import quantizable_experts
from moetor.huggingface.streaming import (
    LoadFigures,
    LoadProgress,
    PlainSink,
    WeightSink,
    read_parts,
    stand_in,
)
from moetor.parallel.shard import ExpertShard


@dataclass(frozen=True, slots=True)
class Withheld:
    """Matrices that are still to be read.

    Attributes:
        forms: of the whole experts modules, by path.
        items: by path and name of the parameter.
        progress: of the load, which goes on when they are read.
    """

    forms: Mapping[str, ExpertsConfig]
    items: Mapping[str, Mapping[str, Streamed]]
    reader: CheckpointReader
    progress: LoadProgress | None


_WITHHELD = "_moetor_withheld_experts"


def leave_withheld(model: nn.Module, withheld: Withheld) -> None:
    """Leaves with a model what is still to be read, for `fuse` to do so once it has spread it."""
    model.__dict__[_WITHHELD] = withheld


def withheld_files(model: nn.Module) -> dict[str, int] | None:
    """Checksums of the files that are still to be read from; None where there are none."""
    withheld: Withheld | None = model.__dict__.get(_WITHHELD)
    return None if withheld is None else withheld.reader.checkpoint.sampled()


def check_withheld(model: nn.Module, *, spread: bool) -> None:
    """Refuses to fuse a model whose experts are still to be read, and not to spread it.

    Raises:
        FusionError: that.
    """
    if _WITHHELD in model.__dict__ and not spread:
        raise FusionError(
            "the model was loaded for several ranks, and its experts are read once it is spread; "
            "call moetor.fuse(model, parallel=...)"
        )


class WithholdingSink(PlainSink):
    """As `PlainSink`, with stand-ins for what a plan leaves out."""

    def __init__(
        self, shapes: Mapping[str, Tensor], device: torch.device, withheld: Withheld
    ) -> None:
        super().__init__(shapes, device)
        self._withheld = withheld

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The finished tensors, and stand-ins."""
        yield from super().tensors()
        for items in self._withheld.items.values():
            for item in items.values():
                yield item.name, stand_in(self._shapes[item.name].shape, item.dtype, self._device)


def withhold(
    model: nn.Module, plan: LoadPlan, reader: CheckpointReader, progress: LoadProgress | None
) -> tuple[LoadPlan, Withheld]:
    """The plan without the experts' matrices, and these."""
    forms = quantizable_experts(model, plan)
    items: dict[str, dict[str, Streamed]] = {path: {} for path in forms}
    kept = []
    for item in plan.streamed:
        path, _, name = item.name.rpartition(".")
        if path in forms and not name.endswith("_bias") and len(item.layout.shape) == 3:
            items[path][name] = item
        else:
            kept.append(item)
    rest = replace(plan, streamed=tuple(kept))
    return rest, Withheld(forms, items, reader, _continued(progress, rest.tensors))


def _continued(progress: LoadProgress | None, before: int) -> LoadProgress | None:
    """Counts on from the tensors that were read before."""
    if progress is None:
        return None
    return lambda done, total, item: progress(before + done, before + total, item)


def share_of(
    item: Streamed, shard: ExpertShard, form: ExpertsConfig
) -> Iterator[tuple[int, Layout]]:
    """Slot by slot what a rank reads of a matrix of all experts.

    Args:
        form: of the whole experts.
    """
    if item.name.endswith("down_proj"):
        axis, bounds = (1 if form.transposed else 2), [(shard.start, shard.stop)]
    else:
        axis, bounds = (2 if form.transposed else 1), shard.up_rows(form)
    ranges = [range(start, stop) for start, stop in bounds]
    rows = item.layout.by_row()
    for slot, expert in enumerate(shard.experts):
        yield slot, rows[expert].select(axis, ranges)


class _ShardSink(WeightSink):
    """Fills the tensors that a spread model has."""

    def __init__(self, places: Mapping[str, Tensor]) -> None:
        self._places = places

    def by_expert(self, item: Streamed) -> bool:
        """Always."""
        return True

    def place(self, item: Streamed, expert: int | None) -> Tensor:
        """One slot of this rank."""
        assert expert is not None, "asked for by expert"
        return self._places[item.name][expert : expert + 1]

    def done(self, item: Streamed, expert: int | None) -> None:
        """Nothing is left to do."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """They are in the model already."""
        return iter(())


def read_withheld(model: nn.Module) -> LoadFigures | None:
    """Reads this rank's share of experts that were withheld into a spread model; None where there
    are none.
    """
    withheld: Withheld | None = model.__dict__.pop(_WITHHELD, None)
    if withheld is None:
        return None
    places: dict[str, Tensor] = {}
    parts: list[tuple[Streamed, list[tuple[int | None, Layout]]]] = []
    for path, module in fused_modules(model):
        where = f"{path}.{module.names.experts}" if isinstance(module, FusedMoEBlock) else path
        layout = module.parallel
        assert layout is not None, "the model has been spread"
        for name, item in withheld.items.get(where, {}).items():
            parameter = module.routed_experts._parameters[name]
            assert parameter is not None, "a fused module has both matrices"
            places[item.name] = parameter.detach()
            parts.append((item, list(share_of(item, layout.shard, withheld.forms[where]))))
    return read_parts(parts, withheld.reader, _ShardSink(places), withheld.progress)
