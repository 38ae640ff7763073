"""Linear modules that Transformers' plan has split over ranks, as products of local tensors.

The plan keeps weights as distributed tensors and wraps forwards, which fusing cannot look into.
Here such a module gets its rank's part of the weight as a plain parameter, and a forward that does
what the wrapper did: nothing for a slice of columns, one sum for a slice of rows, one gathering
where the plan gathers. Each is compared with what the wrapper gave in the observed pass.

Every rank does the same in the same order, since many of these products communicate; what they
decide they decide together.

Shape letters: T tokens, H inputs, N outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from moetor.errors import FusionError, UnsupportedError
from moetor.huggingface.dense_observe import Observation
from moetor.huggingface.dense_products import JoinedProduct
from moetor.huggingface.report import DenseReport
from moetor.huggingface.tensor_parallel import SplitModule, split_modules, spread_over
from moetor.huggingface.trial import relative_error, tolerance
from moetor.kernels import dense
from moetor.parallel.collectives import all_gather, all_reduce, gather_columns
from moetor.parallel.groups import ParallelGroups

# Styles of the plan by what a product of local tensors needs beside itself.
_NOTHING = ("colwise", "packed_colwise", "mla_kv_a_proj", "replicated_with_grad_allreduce")
_SUM = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}
_GATHERING = ("colwise_gather_output", "colwise_rep")
# Styles of modules that are no products; these stay as the plan has them.
_OTHERS = ("embedding_rowwise", "embedding_colwise", "all_reduce", "local_params", "replicate")
_HELD = "_moetor_plans_own"


@dataclass(frozen=True, slots=True)
class _Layout:
    """What makes a local tensor a distributed one."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def distributed(self, local: Tensor) -> DTensor:
        """Of these parts."""
        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )


@dataclass(frozen=True, slots=True)
class _Held:
    """What a module had of the plan. Not its tensors: they would keep the memory of weights that
    are packed meanwhile.
    """

    forward: Any
    layouts: dict[str, _Layout]


class SummedForward:
    """The forward of a linear module with a slice of its weight's columns: one sum over ranks, and
    then the bias.

    Args:
        module: its weight is the rank's [N, H / R].
        splits: whether it is called with all of H, and takes its own part.

    Attributes:
        sums: false while a caller without use for a bias sums the ranks' results itself.
    """

    def __init__(self, module: nn.Linear, group: dist.ProcessGroup, *, splits: bool) -> None:
        self.module, self.group, self.splits = module, group, splits
        self.sums = True

    def __call__(self, input: Tensor) -> Tensor:
        """[..., N] for [..., H / R], or for [..., H]."""
        weight, bias = self.module.weight, self.module.bias
        _refuse_gradients(input, weight)
        if self.splits:
            first = self.group.rank() * -(-self.module.in_features // self.group.size())
            input = input[..., first : first + weight.shape[1]].contiguous()
        part = dense.linear(input, weight)
        if not self.sums:
            return part
        total = all_reduce(part, self.group)
        return total if bias is None else total + bias


class GatheredForward:
    """The forward of a linear module with a slice of its outputs, all of which are gathered.

    Attributes:
        gathers: false where a caller takes the rank's part [..., N / R] for the time being.
    """

    def __init__(self, module: nn.Linear, group: dist.ProcessGroup) -> None:
        self.module, self.group = module, group
        self.gathers = True

    def __call__(self, input: Tensor) -> Tensor:
        """[..., N] for [..., H]."""
        weight, bias = self.module.weight, self.module.bias
        _refuse_gradients(input, weight)
        part = dense.linear(input, weight, bias)
        if not self.gathers:
            return part
        return gather_columns(part, self.module.out_features, self.group)


class GatheredProduct(JoinedProduct):
    """The product of several linear modules with one input, of each of which a rank has an equal
    slice of the outputs: gathered for all of them at once.
    """

    def __init__(
        self, modules: Sequence[nn.Linear], group: dist.ProcessGroup, *, contiguous: bool
    ) -> None:
        super().__init__(modules, contiguous=contiguous)
        self.group = group

    def alone(self, place: int, x: Tensor) -> Tensor:
        """See `JoinedProduct.alone`."""
        return GatheredForward(self.modules[place], self.group)(x)

    def split(self, product: Tensor) -> Sequence[Tensor]:
        """See `JoinedProduct.split`."""
        return gathered_parts(product, self.sizes, self.group)


def gathered_parts(part: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """[..., R * n] for each n of `sizes`, from this rank's [..., sum of the sizes]."""
    gathered_RTN = all_gather(part.reshape(-1, part.shape[-1]), group).view(
        group.size(), -1, part.shape[-1]
    )
    return [
        one.transpose(0, 1).reshape(*part.shape[:-1], -1) for one in gathered_RTN.split(sizes, -1)
    ]


def gathering_group(modules: Sequence[nn.Module]) -> dist.ProcessGroup | None:
    """The ranks that gather the outputs of all of these modules, in equal slices."""
    groups: list[dist.ProcessGroup] = []
    for module in modules:
        forward = module.__dict__.get("forward")
        if not isinstance(forward, GatheredForward):
            return None
        if forward.module.out_features % forward.group.size():
            return None
        groups.append(forward.group)
    return groups[0] if groups else None


def _refuse_gradients(x: Tensor, weight: Tensor) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise UnsupportedError(
            "the dense parts of this spread model are fused for inference and give no gradients; "
            "call it under torch.no_grad(), or fuse it without dense=True"
        )


def common(names: Collection[str], ranks: ParallelGroups | None) -> set[str]:
    """Those that every rank names; every rank asks."""
    if ranks is None:
        return set(names)
    told: list[list[str]] = [[]] * ranks.world.size()
    dist.all_gather_object(told, sorted(names), ranks.world)
    return set.intersection(*map(set, told))


def all_agree(fine: bool, ranks: ParallelGroups | None) -> bool:
    """Whether it is so on every rank; every rank asks."""
    return bool(common(["fine"] if fine else [], ranks))


def take_over(model: nn.Module, observed: Observation) -> list[DenseReport]:
    """Gives split modules that were called plain parameters and forwards of ours.

    Returns:
        Which, and for the others why the plan's wrapper stays.
    """
    ranks = spread_over(model)
    if ranks is None:
        return []
    reports = []
    for one in split_modules(model):
        if one.name not in observed.calls or one.style in _OTHERS:
            continue
        module = model.get_submodule(one.name)
        reason = _reason_to_leave(module, one)
        if reason is None:
            _localise(module, one, ranks)
            reason = _difference(module, observed, one.name, ranks)
            if reason is not None:
                _restore(module)
        reports.append(
            DenseReport(name=one.name, kind="split", done=reason is None, reason=reason or "")
        )
    return reports


def check_taken_over(reports: list[DenseReport]) -> None:
    """Refuses a model of which the plan's wrapper stays on a module.

    Raises:
        FusionError: names some of them, and why.
    """
    left = [report for report in reports if report.kind == "split" and not report.done]
    if left:
        told = "; ".join(f"{report.name}: {report.reason}" for report in left[:3])
        raise FusionError(
            f"fuse_dense='on': {len(left)} modules that Transformers' plan has split over ranks "
            f"cannot be joined ({told}). fuse_dense='auto' fuses the others"
        )


def give_back(model: nn.Module) -> int:
    """Gives these modules the plan's tensors and forwards again; how many there were."""
    held = [module for module in model.modules() if _HELD in module.__dict__]
    for module in held:
        _restore(module)
    return len(held)


def has_taken_over(module: nn.Module) -> bool:
    """Whether a module is one of these."""
    return _HELD in module.__dict__


def _reason_to_leave(module: nn.Module, one: SplitModule) -> str | None:
    """The same on every rank."""
    known = (*_NOTHING, *_SUM, *_GATHERING)
    if one.style not in known:
        return f"its style in the plan, {one.style}, is none of {', '.join(known)}"
    if one.before is not None:
        return "its forward was wrapped before it was split"
    if module.__dict__.get("forward") is not one.after:
        return "its forward was wrapped after it was split"
    if one.style == "replicated_with_grad_allreduce":
        return None
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain linear module"
    if getattr(module, "_hf_quantized_needs_local_tp", False):
        return "its weight is quantised"
    return None


def _localise(module: nn.Module, one: SplitModule, ranks: ParallelGroups) -> None:
    layouts: dict[str, _Layout] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if not isinstance(parameter, DTensor):
            continue
        layouts[name] = _Layout(
            parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride()
        )
        local = cast(DTensor, parameter.detach()).to_local()
        module._parameters[name] = nn.Parameter(local, requires_grad=parameter.requires_grad)
    module.__dict__[_HELD] = _Held(module.__dict__.pop("forward", None), layouts)
    linear = cast(nn.Linear, module)
    if one.style in _SUM:
        splits = _SUM[one.style]
        module.__dict__["forward"] = SummedForward(linear, ranks.tensor, splits=splits)
    elif one.style in _GATHERING:
        module.__dict__["forward"] = GatheredForward(linear, ranks.tensor)


def _restore(module: nn.Module) -> None:
    held: _Held = module.__dict__.pop(_HELD)
    module.__dict__.pop("forward", None)
    if held.forward is not None:
        module.__dict__["forward"] = held.forward
    for name, layout in held.layouts.items():
        parameter = module._parameters[name]
        assert parameter is not None, "it was one of the module's"
        module._parameters[name] = nn.Parameter(
            layout.distributed(parameter.detach()), requires_grad=parameter.requires_grad
        )


def _difference(
    module: nn.Module, observed: Observation, name: str, ranks: ParallelGroups
) -> str | None:
    """Whether the module's answer is another one now, on any rank."""
    call = observed.calls[name]
    with torch.no_grad():
        answer = module(call.input)
    error = float("inf")
    if isinstance(call.output, Tensor) and answer.shape == call.output.shape:
        error = relative_error(answer, call.output)
    if all_agree(error <= tolerance(answer.dtype), ranks):
        return None
    return f"a product of local tensors differs by {error:.1e} here, or on another rank"
