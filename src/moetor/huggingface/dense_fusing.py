"""Fuses the parts of a model that are no experts: linear modules with one input, gated MLPs, norms,
attention between its projections and the attention itself, and the sums of a decoder layer.

Nothing is known by a family's name. One forward pass is observed; what is recognised in it must
reproduce it, part by part, before the model is changed, and the fused model must give its logits.
Every module keeps its place and its parameters' names; what changes is its forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moetor.errors import FusionError, FusionMismatchError
from moetor.huggingface.dense_attention import AttentionForward, recognise_attention
from moetor.huggingface.dense_layers import (
    LayerForward,
    layer_error,
    layer_tolerance,
    recognise_layer,
)
from moetor.huggingface.dense_norms import NormForward, looks_like_norm, recognise_norm
from moetor.huggingface.dense_observe import (
    Call,
    Observation,
    attention_by,
    is_own,
    observe,
    plain_attention,
    random_ids,
    run,
)
from moetor.huggingface.dense_products import (
    ACTIVATIONS,
    FewRowsForward,
    GatedMLPForward,
    JoinedPart,
    JoinedProduct,
    joinable,
    packed,
)
from moetor.huggingface.dense_spread import (
    GatheredProduct,
    all_agree,
    check_taken_over,
    common,
    gathered_parts,
    gathering_group,
    give_back,
    has_taken_over,
    take_over,
)
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.report import DenseKind, DenseReport
from moetor.huggingface.tensor_parallel import spread_over
from moetor.huggingface.trial import relative_error, tolerance
from moetor.kernels import dense
from moetor.kernels.native import dense as native
from moetor.parallel.groups import ParallelGroups

Part = TypeVar("Part")
_FORWARDS = (
    NormForward, JoinedPart, FewRowsForward, GatedMLPForward, AttentionForward, LayerForward,
)  # fmt: skip


def fuse_dense(
    model: nn.Module, *, verify: bool = True, whole_plan: bool = False
) -> list[DenseReport]:
    """Fuses what is recognised, in place, and says what was not and why.

    Of a model that is spread over ranks every rank calls it: what Transformers' plan has split is
    fused as the ranks' local products, and only what every rank recognises.

    Args:
        model: a Transformers model; blocks of experts may be fused already.
        verify: compare the fused model's logits with the original's, beside the parts.
        whole_plan: refuse a spread model of which the plan's wrapper stays on a linear module.

    Raises:
        FusionMismatchError: the parts agree and the whole does not; the model is as it was.
        FusionError: with `whole_plan`; the model is as it was.
    """
    ranks = spread_over(model)
    observed = observe(model)
    if not all_agree(isinstance(observed, Observation), ranks):
        reason = "another rank cannot run it"
        if isinstance(observed, Unrecognised):
            reason = observed.reason
        return [DenseReport(name="", kind="model", done=False, reason=reason)]
    assert isinstance(observed, Observation), "the ranks have agreed"
    with _same_attention(model, observed):
        before = run(model, random_ids(model.config)) if verify else None
        if before is not None:
            same = torch.equal(before, run(model, random_ids(model.config)))
            if not all_agree(same, ranks):
                reason = "it does not give the same logits twice"
                return [DenseReport(name="", kind="model", done=False, reason=reason)]
        reports = take_over(model, observed)
        if whole_plan:
            try:
                check_taken_over(reports)
            except FusionError:
                give_back(model)
                raise
        _fuse_parts(model, observed, ranks, reports)
        if before is not None:
            _check_whole(model, before, ranks)
    return reports


def _fuse_parts(
    model: nn.Module,
    observed: Observation,
    ranks: ParallelGroups | None,
    reports: list[DenseReport],
) -> None:
    norms = _settle(_find_norms(observed), "norm", reports, ranks)
    groups = _settle(_find_groups(observed), "product", reports, ranks)
    attention = _settle(_find_attention(observed, norms), "attention", reports, ranks)
    layers = _find_layers(observed, norms, reports, ranks)
    mlps = {
        name: mlp
        for name, calls in groups.items()
        if (mlp := _gated_mlp(observed, calls)) is not None
    }
    mlps = {name: mlps[name] for name in mlps if name in common(mlps, ranks)}
    forwards: dict[str, Any] = {**norms, **attention, **layers}
    for path, forward in forwards.items():
        model.get_submodule(path).__dict__["forward"] = forward
    _install_products(model, groups, mlps, reports)
    _install_rows(observed, reports)


def unfuse_dense(model: nn.Module) -> int:
    """Gives every module its own forward again, or the plan's of a spread model; how many had
    another.
    """
    products = set()
    count = 0
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if not isinstance(forward, _FORWARDS):
            continue
        count += 1
        if isinstance(forward, JoinedPart):
            products.add(forward.product)
        else:
            module.__dict__.pop("forward")
    for product in products:
        product.remove()
    return count + give_back(model)


def is_dense_fused(model: nn.Module) -> bool:
    """Whether `fuse_dense` changed the model."""
    return any(
        isinstance(m.__dict__.get("forward"), _FORWARDS) or has_taken_over(m)
        for m in model.modules()
    )


def _settle(
    made: Mapping[str, Part | Unrecognised],
    kind: DenseKind,
    reports: list[DenseReport],
    ranks: ParallelGroups | None,
) -> dict[str, Part]:
    """What was recognised on every rank, and a report on each."""
    ours = {name: one for name, one in made.items() if not isinstance(one, Unrecognised)}
    settled = common(ours, ranks)
    for name, one in made.items():
        reason = "" if name in settled else "another rank does not recognise its own part"
        if isinstance(one, Unrecognised):
            reason = one.reason
        reports.append(DenseReport(name=name, kind=kind, done=not reason, reason=reason))
    return {name: one for name, one in ours.items() if name in settled}


def _same_attention(model: nn.Module, observed: Observation) -> AbstractContextManager[None]:
    return attention_by(model, plain_attention) if observed.watched else nullcontext()


def _check_whole(model: nn.Module, before: Tensor, ranks: ParallelGroups | None) -> None:
    with torch.no_grad():
        after = run(model, random_ids(model.config))
    deviation = (after.double() - before.double()).abs().amax(-1) / before.double().abs().max()
    half = before.dtype in (torch.float16, torch.bfloat16)
    # In half precision a token may get other experts after another rounding.
    error = float((deviation.median() if half else deviation.max()).item())
    limit = 0.25 if half else 1e-3
    if not all_agree(error <= limit, ranks):
        unfuse_dense(model)
        raise FusionMismatchError(
            f"with its dense parts fused the model's logits differ by {error:.1e} of the largest, "
            f"{limit:.0e} is allowed; the dense parts are as they were. Use dense=False"
        )


def _find_norms(observed: Observation) -> dict[str, NormForward | Unrecognised]:
    return {
        path: recognise_norm(call.module, call.input)
        for path, call in observed.calls.items()
        if looks_like_norm(call.module) and isinstance(call.input, Tensor)
    }


def _find_groups(observed: Observation) -> dict[str, list[Call] | Unrecognised]:
    """Linear modules of one parent that were called with one tensor, where one product of their
    packed weights gives what they gave.
    """
    groups: dict[tuple[str, int], list[Call]] = {}
    for path, call in observed.calls.items():
        if isinstance(call.module, nn.Linear) and isinstance(call.input, Tensor):
            groups.setdefault((path.rpartition(".")[0], id(call.input)), []).append(call)
    found: dict[str, list[Call] | Unrecognised] = {}
    for calls in groups.values():
        modules: list[Any] = [call.module for call in calls]
        gathering = gathering_group(modules)
        if gathering is None and not all(map(is_own, modules)):
            continue
        if not joinable(modules) or _tied(modules):
            continue
        weight, bias = packed(modules)
        sizes = [module.weight.shape[0] for module in modules]
        product = dense.linear(calls[0].input, weight, bias)
        parts = product.split(sizes, dim=-1)
        if gathering is not None:
            parts = gathered_parts(product, sizes, gathering)
        errors = [relative_error(x, call.output) for x, call in zip(parts, calls, strict=True)]
        names = " + ".join([calls[0].path, *(call.path.rpartition(".")[2] for call in calls[1:])])
        found[names] = calls
        if max(errors) > tolerance(weight.dtype):
            found[names] = Unrecognised(f"one product differs by {max(errors):.1e}")
    return found


def _tied(modules: list[Any]) -> bool:
    """Whether two of them hold one weight, or a weight that is part of another tensor."""
    weights = [module.weight for module in modules]
    places = {weight.data_ptr() for weight in weights}
    whole = all(w.untyped_storage().nbytes() == w.numel() * w.element_size() for w in weights)
    return len(places) < len(weights) or not whole or weights[0].device.type == "meta"


def _find_attention(
    observed: Observation, norms: dict[str, NormForward]
) -> dict[str, AttentionForward | Unrecognised]:
    found: dict[str, AttentionForward | Unrecognised] = {}
    for path, call in observed.calls.items():
        seen = observed.attention.get(id(call.module))
        if seen is None or not is_own(call.module):
            continue
        prefix = f"{path}."
        own = {
            name.removeprefix(prefix): norm
            for name, norm in norms.items()
            if name.startswith(prefix)
        }
        projected = observed.calls.get(f"{prefix}o_proj")
        found[path] = recognise_attention(call, seen, own, projected)
    return found


def _find_layers(
    observed: Observation,
    norms: dict[str, NormForward],
    reports: list[DenseReport],
    ranks: ParallelGroups | None,
) -> dict[str, LayerForward]:
    made: dict[str, LayerForward | Unrecognised] = {
        path: recognise_layer(call, observed, norms) for path, call in _layer_calls(observed, norms)
    }
    # A layer of a spread model communicates: it is tried where every rank tries it.
    tried = common([p for p, one in made.items() if isinstance(one, LayerForward)], ranks)
    for path, one in made.items():
        call = observed.calls[path]
        if path not in tried or isinstance(one, Unrecognised):
            continue
        error = layer_error(one, call)
        if error > layer_tolerance(call.first_output.dtype):
            made[path] = Unrecognised(f"norm, mixer, norm, MLP and two sums differ by {error:.1e}")
    found = _settle(made, "layer", reports, ranks)
    by_input = {id(observed.calls[path].input): norm for path, norm in norms.items()}
    for path, layer in found.items():
        layer.follower = by_input.get(id(observed.calls[path].first_output))
    return found


def _layer_calls(
    observed: Observation, norms: dict[str, NormForward]
) -> Iterator[tuple[str, Call]]:
    """Members of a list of modules that have recognised norms among their children and answer with
    what they are given the shape of.
    """
    parents = {path.rpartition(".")[0] for path in norms}
    for path, call in observed.calls.items():
        x, y = call.input, call.first_output
        listed = path.rpartition(".")[2].isdigit() and path in parents and is_own(call.module)
        if listed and isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
            yield path, call


def _parent(model: nn.Module, calls: list[Call]) -> nn.Module:
    return model.get_submodule(calls[0].path.rpartition(".")[0])


def _install_products(
    model: nn.Module,
    groups: dict[str, list[Call]],
    mlps: dict[str, tuple[Call, str, Any]],
    reports: list[DenseReport],
) -> None:
    for name, calls in groups.items():
        parent_forward = _parent(model, calls).__dict__.get("forward")
        contiguous = not isinstance(parent_forward, AttentionForward)
        modules: list[Any] = [call.module for call in calls]
        gathering = gathering_group(modules)
        product = (
            JoinedProduct(modules, contiguous=contiguous)
            if gathering is None
            else GatheredProduct(modules, gathering, contiguous=contiguous)
        )
        product.install()
        if name in mlps:
            parent, down, activation = mlps[name]
            parent.module.__dict__["forward"] = GatedMLPForward(
                parent.module, product, down, activation
            )
            reports.append(DenseReport(name=parent.path, kind="mlp", done=True))


def _gated_mlp(observed: Observation, calls: list[Call]) -> tuple[Call, str, Any] | None:
    """The MLP whose gate and up these are, its down projection and its activation."""
    parent = observed.calls.get(calls[0].path.rpartition(".")[0])
    if parent is None or len(calls) != 2 or not is_own(parent.module):
        return None
    others = [
        call
        for call in observed.children(parent.path)
        if isinstance(call.module, nn.Linear) and call.path not in {one.path for one in calls}
    ]
    plain = len(parent.given) == 1 and not parent.extra and parent.input is calls[0].input
    if len(others) != 1 or not plain or not isinstance(parent.output, Tensor):
        return None
    if any(call.module._forward_hooks or call.module._forward_pre_hooks for call in calls):
        return None
    if not all(is_own(call.module) for call in calls):  # outputs are gathered before they meet
        return None
    down = others[0]
    weight, bias = packed([call.module for call in calls])
    for activation in ACTIVATIONS:
        act = dense.gated_linear(parent.input, weight, bias, activation)
        if relative_error(act, down.input) <= tolerance(act.dtype):
            same = relative_error(down.output, parent.output) == 0.0
            return (parent, down.path.rpartition(".")[2], activation) if same else None
    return None


def _install_rows(observed: Observation, reports: list[DenseReport]) -> None:
    """Every other linear module, where few rows have products of their own."""
    for path, call in observed.calls.items():
        module = call.module
        if type(module) is not nn.Linear or not is_own(module):
            continue
        if not (module.weight.is_cuda or native.ready(module.weight)):
            continue
        module.__dict__["forward"] = FewRowsForward(module)
        reports.append(DenseReport(name=path, kind="rows", done=True))
