"""Which rank holds which expert, and the tables by which tokens find it.

Logical experts are those of the router. A *part* is what one rank holds of them; each of its slots
holds one logical expert, and an expert may stand in several slots (redundant experts, EPLB). Slots
are numbered through all parts as *physical* experts. Shape letters: T tokens, K top_k, E logical
experts, P physical experts, C copies of an expert, M members of a token group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moetor.errors import ConfigError
from moetor.kernels.routing import Routing
from moetor.kernels.triton.held import copies_in_turn, held, held_refusal


def split_evenly(count: int, parts: int) -> list[int]:
    """`count` things in `parts` shares that differ by at most one, the larger ones first."""
    small, more = divmod(count, parts)
    return [small + (part < more) for part in range(parts)]


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """The logical expert in every slot of every part.

    Attributes:
        num_experts: E.
        parts: for every part its slots' experts.

    Raises:
        ConfigError: a part without a slot, an expert without one, or an id out of range.
    """

    num_experts: int
    parts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = {expert for part in self.parts for expert in part}
        if not all(self.parts):
            raise ConfigError("ExpertPlacement: a part holds no expert")
        if held != set(range(self.num_experts)):
            raise ConfigError(
                f"ExpertPlacement: the parts hold {len(held)} of {self.num_experts} experts"
            )

    @classmethod
    def linear(cls, num_experts: int, num_parts: int, redundant: int = 0) -> ExpertPlacement:
        """Experts in order, then the copies of experts 0, 1, ...; parts differ by at most one slot.

        Raises:
            ConfigError: fewer slots than parts, or more copies than there is room for.
        """
        slots = num_experts + redundant
        if slots < num_parts:
            raise ConfigError(
                f"{num_experts} experts and {redundant} redundant ones do not fill {num_parts} "
                f"ranks; possible: an expert_parallel_size of at most {slots}, or at least "
                f"{num_parts - num_experts} redundant experts"
            )
        if redundant > num_experts * (num_parts - 1):
            raise ConfigError(
                f"num_redundant_experts={redundant} exceeds {num_experts * (num_parts - 1)}, with "
                f"which each of {num_parts} ranks holds all {num_experts} experts"
            )
        experts = [slot % num_experts for slot in range(slots)]
        parts, start = [], 0
        for size in split_evenly(slots, num_parts):
            parts.append(tuple(experts[start : start + size]))
            start += size
        return cls(num_experts, tuple(parts))

    @property
    def num_physical(self) -> int:
        """P: slots of all parts."""
        return sum(len(part) for part in self.parts)

    @property
    def first_physical(self) -> list[int]:
        """For every part the physical number of its first slot."""
        first, starts = 0, []
        for part in self.parts:
            starts.append(first)
            first += len(part)
        return starts

    @property
    def logical_of_physical(self) -> list[int]:
        """The expert in every physical slot."""
        return [expert for part in self.parts for expert in part]

    def copies(self) -> list[list[int]]:
        """For every logical expert its physical slots."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for physical, expert in enumerate(self.logical_of_physical):
            found[expert].append(physical)
        return found

    def slot_table(self, member_parts: Sequence[int]) -> Tensor:
        """Int32 [M, P + 1]: the slot of a physical expert on a member, or the member's number of
        slots where it does not hold it.
        """
        table = torch.empty((len(member_parts), self.num_physical + 1), dtype=torch.int32)
        for member, part in enumerate(member_parts):
            size, start = len(self.parts[part]), self.first_physical[part]
            table[member] = size
            table[member, start : start + size] = torch.arange(size, dtype=torch.int32)
        return table


def held_by_table(weights_TK: Tensor, ids_TK: Tensor, table: Tensor, size: int) -> Routing:
    """A routing to the slots `table[ids]`; what has none below `size` becomes a dropped slot.

    Args:
        table: int32, by expert id.
    """
    if _in_one_launch(ids_TK.device.type):
        return held(weights_TK, ids_TK, table, size)
    slots_TK = table[ids_TK.long()]
    return Routing(torch.where(slots_TK < size, weights_TK, 0.0), slots_TK)


@cache
def _in_one_launch(device: str) -> bool:
    return held_refusal(device) is None


class ExpertMap:
    """A placement as tables on a device; `update` changes them in place, so that captured graphs
    see a new placement.

    Args:
        placement: whose number of slots per part never changes.
        member_parts: the part of every member of the token group.
        me: this rank's number among the members.
    """

    def __init__(self, placement: ExpertPlacement, member_parts: Sequence[int], me: int) -> None:
        self.placement = placement
        self.member_parts = tuple(member_parts)
        self.me = me
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, placement: ExpertPlacement) -> None:
        """Takes another placement.

        Raises:
            ConfigError: it has other part sizes.
        """
        sizes = [len(part) for part in self.placement.parts]
        if [len(part) for part in placement.parts] != sizes:
            raise ConfigError(f"a placement's parts must keep their {sizes} slots")
        self.placement = placement
        for device, tables in self._tables.items():
            for old, new in zip(tables, self._make(device), strict=True):
                old.copy_(new)

    @property
    def unique(self) -> bool:
        """Whether no expert has a copy; then tokens need no turns, and the id of an expert stands
        for its only slot.
        """
        return self.placement.num_physical == self.placement.num_experts

    def _make(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        placement = self.placement
        copies = placement.copies()
        slots = placement.slot_table(self.member_parts)
        if self.unique:
            slots = slots[:, [*(have[0] for have in copies), placement.num_physical]]
        width = len(placement.parts)  # no expert needs two slots of one part
        rows = [(have * width)[:width] for have in copies]
        rows.append([placement.num_physical] * width)
        counts = [min(len(have), width) for have in copies] + [1]
        return (
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.tensor(counts, dtype=torch.int32, device=device),
            slots.to(device),
        )

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = self._make(device)
        return self._tables[device]

    def physical(self, logical_TK: Tensor) -> Tensor:
        """Physical ids int32 [T, K]; copies take turns by token and slot. A dropped slot is P.

        Where no expert has a copy these are the logical ids.
        """
        if self.unique:
            return logical_TK
        copies_EC, counts_E, _ = self._on(logical_TK.device)
        if _in_one_launch(logical_TK.device.type):
            return copies_in_turn(logical_TK, copies_EC, counts_E)
        logical = logical_TK.long()
        tokens, top_k = logical.shape
        turn = torch.arange(tokens, device=logical.device, dtype=torch.int32).unsqueeze(1)
        turn = turn + torch.arange(top_k, device=logical.device, dtype=torch.int32)
        return copies_EC[logical, (turn % counts_E[logical]).long()]

    def held(self, weights_TK: Tensor, physical_TK: Tensor) -> Routing:
        """A routing to this rank's slots; what it does not hold becomes a dropped slot."""
        table = self._on(physical_TK.device)[2][self.me]
        return held_by_table(weights_TK, physical_TK, table, self.num_slots())

    def all_slots(self, physical_TK: Tensor) -> Tensor:
        """Slots int32 [M, T, K] on every member."""
        return self._on(physical_TK.device)[2][:, physical_TK.long()]

    def num_slots(self, member: int | None = None) -> int:
        """Slots of a member (this rank)."""
        return len(self.placement.parts[self.member_parts[self.me if member is None else member]])

    def all_num_slots(self, device: torch.device) -> Tensor:
        """Int32 [M]: every member's number of slots, on the device."""
        return self._on(device)[2][:, -1]
