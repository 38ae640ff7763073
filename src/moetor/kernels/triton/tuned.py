"""Plans that `moetor tune` measured on this very GPU, kept in the user's cache folder.

A plan belongs to a GPU model, a version of Triton and of these kernels: it is kept in a file named
after them, and a file of others is never looked at.

Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moetor.config import ExpertsConfig
from moetor.kernels.cache import cache_root
from moetor.kernels.triton.choose import (
    Device,
    LargePlan,
    SmallPlan,
    Tile,
    VectorTile,
    next_power_of_2,
)

FORMAT = "moetor-tuned/1"
_NOWHERE = Path("/nonexistent/moetor-tuned.json")
Plan = SmallPlan | LargePlan
_PLANS: dict[str, type[Plan]] = {"small": SmallPlan, "large": LargePlan}
_POWERS = ("rows", "columns", "depth", "warps")
_NESTED: dict[type[Any], type[Any]] = {SmallPlan: VectorTile, LargePlan: Tile}


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPlan:
    """What was found for one shape and range of T.

    Attributes:
        plan: the fastest; the chosen one itself where nothing was faster.
        seconds: of a call with it.
        chosen_seconds: of a call with the plan that `choose` computes.
        complete: whether everything worth trying was tried.
    """

    plan: Plan
    seconds: float
    chosen_seconds: float
    complete: bool


def plan_key(config: ExpertsConfig, top_k: int, tokens: int, itemsize: int) -> str:
    """Names a shape, its storage form and the range of T: up to the next power of two."""
    form = [
        name
        for name in ("gated", "interleaved", "transposed", "has_bias", "weight_on_input")
        if getattr(config, name)
    ]
    # Forms that one of the two paths does not have: its plans are none for them.
    form += ["post_norm"] if config.post_norm_eps is not None else []
    form += ["unfused"] if config.activation.function is not None else []
    sizes = f"E{config.num_experts} K{top_k} H{config.hidden_size} I{config.intermediate_size}"
    return " ".join((sizes, *form, f"{8 * itemsize} bits", f"T{next_power_of_2(tokens)}"))


class TunedPlans:
    """The plans of one file, read once.

    Args:
        path: of the file, which need not exist.
        device: on which they run; a plan that needs more shared memory is not taken.
    """

    def __init__(self, path: Path, device: Device) -> None:
        self.path = path
        self._device = device
        self._plans = self._read()

    def __bool__(self) -> bool:
        return bool(self._plans)

    def get(self, key: str) -> TunedPlan | None:
        """What was found, or None."""
        return self._plans.get(key)

    def tokens(self, config: ExpertsConfig, top_k: int, itemsize: int) -> list[int]:
        """The upper ends of the ranges of T for which a shape is tuned, rising."""
        start = plan_key(config, top_k, 1, itemsize).removesuffix("1")
        found = (key.removeprefix(start) for key in self._plans if key.startswith(start))
        return sorted(int(tokens) for tokens in found if tokens.isdigit())

    def put(self, key: str, found: TunedPlan) -> None:
        """Keeps `found`, at once and whole: a process that is killed leaves the file as it was.

        Raises:
            OSError: the folder cannot be written.
        """
        # Another process may have tuned other shapes meanwhile.
        self._write(self._read() | {key: found})

    def drop(self, config: ExpertsConfig, top_k: int, itemsize: int, tokens: Iterable[int]) -> None:
        """Forgets what was found for a shape at these T.

        Raises:
            OSError: the folder cannot be written.
        """
        gone = {plan_key(config, top_k, count, itemsize) for count in tokens}
        self._write({key: plan for key, plan in self._read().items() if key not in gone})

    def _write(self, plans: dict[str, TunedPlan]) -> None:
        self._plans = plans
        record = {
            "format": FORMAT,
            "plans": {key: _to_json(plan) for key, plan in sorted(self._plans.items())},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _read(self) -> dict[str, TunedPlan]:
        """The file's plans; what cannot be used is left out with a warning that says why."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            self._warn(f"cannot be read: {error}")
            return {}
        try:
            record = json.loads(text)
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r} is not {FORMAT!r}")
            found = {key: _from_json(value) for key, value in record["plans"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._warn(f"are damaged: {type(error).__name__}: {error}")
            return {}
        kept = {key: tuned for key, tuned in found.items() if _fits(tuned.plan, self._device)}
        if len(kept) < len(found):
            self._warn("hold tiles that do not fit this GPU's shared memory")
        return kept

    def _warn(self, why: str) -> None:
        warnings.warn(
            f"tuned plans in {self.path} {why}; they are not used. Delete the file, and run "
            f"`moetor tune` again if you like",
            stacklevel=4,
        )


def _to_json(found: TunedPlan) -> dict[str, Any]:
    path = next(name for name, kind in _PLANS.items() if isinstance(found.plan, kind))
    return asdict(found) | {"path": path}


def _from_json(value: dict[str, Any]) -> TunedPlan:
    plan = _made(_PLANS[value["path"]], value["plan"])
    if isinstance(plan, LargePlan) and plan.up.rows != plan.down.rows:
        raise ValueError(f"products of {plan.up.rows} and of {plan.down.rows} rows share no map")
    times = (value["seconds"], value["chosen_seconds"])
    if not all(isinstance(time, float) and time > 0 for time in times):
        raise ValueError(f"times {times} are not positive numbers")
    if type(value["complete"]) is not bool:
        raise TypeError("complete is not true or false")
    return TunedPlan(
        plan=plan, seconds=times[0], chosen_seconds=times[1], complete=value["complete"]
    )


def _made(kind: type[Any], value: dict[str, Any]) -> Any:
    """A plan or tile of plain values, with exactly its fields and their types."""
    named = {field.name: field for field in fields(kind)}
    if set(value) != set(named):
        raise ValueError(f"{kind.__name__} has fields {sorted(named)}, not {sorted(value)}")
    given: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            given[name] = _made(_NESTED[kind], inner)
            continue
        given[name] = _checked(f"{kind.__name__}.{name}", str(named[name].type), inner)
    return kind(**given)


def _checked(name: str, kind: str, value: Any) -> Any:
    """A number or a switch of a plan."""
    if type(value).__name__ != kind or value < 0:
        raise ValueError(f"{name}={value!r} is not one of its values")
    if name.rpartition(".")[2] in _POWERS and next_power_of_2(value) != value:
        raise ValueError(f"{name}={value} is not a power of two")
    return value


def _fits(plan: Plan, device: Device) -> bool:
    if isinstance(plan, SmallPlan):
        return True
    # At least: a gated product has twice the columns, larger numbers twice the bytes.
    return all(
        tile.shared_bytes(width=tile.columns, itemsize=2, first=first) <= device.shared
        for tile, first in ((plan.up, True), (plan.down, False))
    )


@functools.cache
def fingerprint() -> str:
    """Of Triton and of the code that a plan describes."""
    import triton  # type: ignore[import-not-found, unused-ignore]

    digest = hashlib.sha256()
    digest.update(triton.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.name not in ("tuned.py", "candidates.py", "fused.py"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def plans_path(gpu: str, device: Device) -> Path:
    """The file for GPUs of this name."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    major, minor = device.capability
    return cache_root() / "tuned" / f"{name}-sm{major}{minor}-{fingerprint()}.json"


@functools.cache
def plans_of(index: int) -> TunedPlans:
    """The plans for CUDA device number `index`, read at the first call."""
    import torch

    from moetor.kernels.triton.support import gpu

    device = gpu(index)
    try:
        path = plans_path(torch.cuda.get_device_name(index), device)
    except RuntimeError:  # the user has no home
        path = _NOWHERE
    return TunedPlans(path, device)


def forget() -> None:
    """The next call reads the files again."""
    plans_of.cache_clear()
    tuned_plan.cache_clear()


@functools.lru_cache(maxsize=4096)
def tuned_plan(
    config: ExpertsConfig, top_k: int, bucket: int, itemsize: int, index: int
) -> Plan | None:
    """The plan for up to `bucket` tokens (a power of two) on CUDA device `index`, or None."""
    plans = plans_of(index)
    found = plans.get(plan_key(config, top_k, bucket, itemsize)) if plans else None
    return None if found is None else found.plan
