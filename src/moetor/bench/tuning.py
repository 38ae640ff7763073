"""The search of `moetor tune`: the fastest plan for a shape and a number of tokens.

A search starts at the plan that is computed, times the plans around it, moves to the fastest and
goes on from there until none is faster or time is up. What it found is kept after every number of
tokens, and a search that was cut off goes on from there.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from moetor.kernels.triton.tuned import Plan, TunedPlan, TunedPlans

# A plan must be faster than the computed one by this much to be kept: timings differ from run to
# run.
_GAIN = 1.02
# Plans that are compiled side by side.
_AT_ONCE = 8

Neighbours = Callable[[Plan], Iterable[tuple[str, Plan]]]


class PlanTimer(ABC):
    """Times plans for one shape and number of tokens."""

    @abstractmethod
    def prepare(self, plans: list[Plan]) -> None:
        """What can be done for several plans at once before they are timed; a plan that fails is
        not told here."""

    @abstractmethod
    def seconds(self, plan: Plan) -> float | None:
        """Of a call; None where the plan does not run, or not rightly.

        Raises:
            torch.OutOfMemoryError: the GPU's memory does not hold the call.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneCase:
    """One number of tokens.

    Attributes:
        key: under which the result is kept.
        starts: the computed plan, then other places to search from.
        neighbours: the plans around one.
        timer: made when the case is begun.
    """

    tokens: int
    key: str
    starts: tuple[Plan, ...]
    neighbours: Neighbours
    timer: Callable[[], PlanTimer]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRow:
    """What came of a case.

    Attributes:
        found: None where nothing could be measured.
        tried: plans timed in this run; 0 where the result was there already.
        note: what a reader should know: nothing tried, out of memory, not complete.
    """

    tokens: int
    found: TunedPlan | None
    tried: int
    note: str = ""


def tune(
    cases: Iterable[TuneCase],
    store: TunedPlans,
    seconds: float,
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[TuneRow]:
    """Searches case by case, and keeps each result before the next one begins.

    Args:
        cases: by rising number of tokens.
        seconds: for all of them; what is left is shared evenly by the cases that are left.
        progress: called with a line about each plan.

    Raises:
        OSError: the results cannot be kept.
    """
    waiting = [(case, store.get(case.key)) for case in cases]
    end, full = clock() + seconds, False
    while waiting:
        (case, before), left = waiting.pop(0), len(waiting)
        if before is not None and before.complete:
            yield TuneRow(tokens=case.tokens, found=before, tried=0, note="kept from before")
            continue
        if full:
            note = "left out: fewer tokens are out of memory already"
            yield TuneRow(tokens=case.tokens, found=before, tried=0, note=note)
            continue
        now = clock()
        if now >= end:
            yield TuneRow(tokens=case.tokens, found=before, tried=0, note="no time was left")
            continue
        search = _Search(case, before, now + (end - now) / (left + 1), progress, clock)
        try:
            found = search.run()
        except torch.OutOfMemoryError:
            full = True
            yield TuneRow(
                tokens=case.tokens, found=before, tried=search.tried, note="out of memory"
            )
            continue
        if found is not None:
            store.put(case.key, found)
        yield TuneRow(tokens=case.tokens, found=found, tried=search.tried, note=_remark(found))


def _remark(found: TunedPlan | None) -> str:
    if found is None:
        return "no plan could be timed"
    return "" if found.complete else "time was up; run again to go on"


class _Search:
    """The search of one case, until `until`."""

    def __init__(
        self,
        case: TuneCase,
        before: TunedPlan | None,
        until: float,
        progress: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._case, self._before, self._until = case, before, until
        self._progress, self._clock = progress, clock
        self._seen: dict[Plan, float | None] = {}
        self._timer: PlanTimer | None = None

    @property
    def tried(self) -> int:
        """Plans timed so far."""
        return len(self._seen)

    def run(self) -> TunedPlan | None:
        """The fastest plan; None where the computed one cannot be timed."""
        case = self._case
        self._timer = case.timer()
        chosen, *others = case.starts
        first = self._time("computed", chosen)
        if first is None:
            return None
        starts = [chosen, *others]
        if self._before is not None:
            starts.insert(1, self._before.plan)
        for start in starts:
            self._time("start", start)
        complete = True
        for start in sorted(starts, key=self._seconds_of):
            # A start that is far behind is not worth a walk.
            if self._seconds_of(start) <= 1.25 * self._seconds_of(self._fastest()):
                complete = self._climb(start) and complete
        best = self._fastest()
        if best != chosen:
            # Again, right after each other: the first times are minutes apart.
            del self._seen[chosen], self._seen[best]
            first = self._time("computed, again", chosen) or first
            again = self._time("fastest, again", best)
            if again is None or first < _GAIN * again:
                best = chosen
        return TunedPlan(
            plan=best,
            seconds=self._seconds_of(best),
            chosen_seconds=first,
            complete=complete,
        )

    def _climb(self, plan: Plan) -> bool:
        """Walks from `plan` to the fastest plan around; False where time was up."""
        assert self._timer is not None, "made in run"
        while True:
            around = list(self._case.neighbours(plan))
            for start in range(0, len(around), _AT_ONCE):
                if self._clock() >= self._until:
                    return False
                some = around[start : start + _AT_ONCE]
                self._timer.prepare([other for _, other in some if other not in self._seen])
                for name, other in some:
                    self._time(name, other)
            best = min([plan, *(other for _, other in around)], key=self._seconds_of)
            if best == plan:
                return True
            plan = best

    def _time(self, name: str, plan: Plan) -> float | None:
        assert self._timer is not None, "made in run"
        if plan not in self._seen:
            try:
                seconds = self._timer.seconds(plan)
            except torch.OutOfMemoryError:
                if not self._seen:
                    raise
                seconds = None  # this plan alone takes too much
            self._seen[plan] = seconds
            said = "does not run" if seconds is None else f"{seconds * 1e6:.1f} us"
            self._progress(f"T={self._case.tokens} {name}: {said}")
        return self._seen[plan]

    def _seconds_of(self, plan: Plan) -> float:
        seconds = self._seen.get(plan)
        return float("inf") if seconds is None else seconds

    def _fastest(self) -> Plan:
        return min(self._seen, key=self._seconds_of)
