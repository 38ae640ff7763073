"""`moetor eplb plan`: experts on ranks, as they are in order and as a recorded load wants them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moetor.cli.console import print_json, print_table
from moetor.cli.flags import UsageError
from moetor.cli.options import OUTPUT
from moetor.output_paths import check_output_file
from moetor.parallel.config import EplbConfig

if TYPE_CHECKING:
    from moetor.parallel.placement import ExpertPlacement

COLUMNS = ("layer", "balanced before", "after", "busiest rank before", "after", "experts moved")


@dataclass(frozen=True, kw_only=True, slots=True)
class EplbPlanOptions:
    """Show how evenly a recorded load falls on ranks, before and after experts are placed for it.

    Balanced is the mean load of a rank over the largest: 1 is even. Busiest rank is the largest
    load over an even share. An expert's copies share its load equally.
    """

    stats: str = field(
        metadata={"positional": True, "help": "a file of moetor experts --save-stats"}
    )
    ranks: int = field(default=2, metadata={"metavar": "N", "help": "ranks that share the experts"})
    num_redundant_experts: int = field(
        default=0,
        metadata={"metavar": "N", "help": "further slots per layer, for copies of busy experts"},
    )
    policy: Literal["auto", "global", "hierarchical"] = field(
        default="auto",
        metadata={
            "help": "global may put any expert anywhere, hierarchical keeps routing groups on one "
            "node; auto takes the latter where groups divide by nodes"
        },
    )
    nodes: int = field(
        default=1, metadata={"metavar": "N", "help": "nodes that the ranks stand on"}
    )
    groups: int = field(
        default=1, metadata={"metavar": "N", "help": "routing groups of consecutive experts"}
    )
    json: bool = field(
        default=False,
        metadata={
            "group": OUTPUT,
            "help": "print one JSON object on standard output and nothing else there",
        },
    )
    plot: Path | None = field(
        default=None,
        metadata={
            "group": OUTPUT,
            "metavar": "FILE.png",
            "help": "write a picture: ranks against layers, before and after",
        },
    )

    def __post_init__(self) -> None:
        for name in ("ranks", "nodes", "groups"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.num_redundant_experts < 0:
            raise UsageError(
                f"--num-redundant-experts {self.num_redundant_experts} must not be negative"
            )
        check_output_file("--plot", self.plot, ending=".png")


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer's load and its two placements."""

    name: str
    loads: list[float]
    before: ExpertPlacement
    after: ExpertPlacement


def run(options: EplbPlanOptions) -> int:
    """Plan, print, draw, and return the exit status."""
    if options.plot is not None:
        from moetor.bench.plot import check_plotting

        check_plotting()
    planned = _plan(options)
    if options.json:
        print_json({"stats": options.stats, "layers": [_told(layer) for layer in planned]})
    else:
        title = (
            f"{options.stats}: {options.ranks} ranks, "
            f"{options.num_redundant_experts} redundant experts"
        )
        print_table(title, COLUMNS, _rows(planned))
    if options.plot is not None:
        from moetor.cli.placement_picture import draw_placements

        draw_placements(planned, options.plot)
    return 0


def _plan(options: EplbPlanOptions) -> list[PlannedLayer]:
    from moetor.parallel.eplb.balance import balance
    from moetor.parallel.eplb.statistics import read_loads
    from moetor.parallel.placement import ExpertPlacement

    config = EplbConfig(policy=options.policy, num_nodes=options.nodes)
    planned = []
    for name, loads in read_loads(Path(options.stats)).items():
        before = ExpertPlacement.linear(len(loads), options.ranks, options.num_redundant_experts)
        after = balance(before, loads, config, options.groups)
        planned.append(PlannedLayer(name, loads, before, after))
    return planned


def _figures(layer: PlannedLayer) -> tuple[float, float, float, float, int]:
    """Balancedness and busiest rank, each before and after, and the experts that move."""
    from moetor.parallel.eplb.balance import balancedness, part_loads
    from moetor.parallel.eplb.rearrange import moves_between

    even = sum(layer.loads) / len(layer.before.parts) or 1.0
    placements = (layer.before, layer.after)
    first, second = (balancedness(placement, layer.loads) for placement in placements)
    busy, less = (max(part_loads(placement, layer.loads)) / even for placement in placements)
    return first, second, busy, less, len(moves_between(layer.before, layer.after))


def _rows(planned: list[PlannedLayer]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for layer in planned:
        first, second, busy, less, moved = _figures(layer)
        slots = layer.before.num_physical
        rows.append(
            (
                layer.name,
                f"{first:.3f}",
                f"{second:.3f}",
                f"{busy:.2f}x",
                f"{less:.2f}x",
                f"{moved} of {slots}",
            )
        )
    return rows


def _told(layer: PlannedLayer) -> dict[str, object]:
    first, second, _, _, moved = _figures(layer)
    return {
        "layer": layer.name,
        "balancedness_before": first,
        "balancedness_after": second,
        "moved": moved,
        "placement": [list(part) for part in layer.after.parts],
    }
