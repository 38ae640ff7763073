"""Decoder layers of the form x + mixer(norm(x)), then x + mlp(norm(x)): each sum and the norm after
it in one launch, also across layers.

The layer's parts are told apart by what they were called with; the forward that is put together
from them must give what the layer gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetor.huggingface.dense_norms import NormForward
from moetor.huggingface.dense_observe import Call, Observation, bind, parameter_defaults
from moetor.huggingface.dense_spread import SummedForward
from moetor.huggingface.experts_form import Unrecognised
from moetor.huggingface.trial import tolerance
from moetor.kernels import dense
from moetor.kernels.dense import Norm
from moetor.layer import MoELayer
from moetor.parallel.small_sums import SmallSums, small_sums


@dataclass(frozen=True, slots=True)
class LastSum:
    """A sum over ranks, which the launch of the norm after it can make for few rows.

    Attributes:
        owner: makes the sum itself unless its `sums` is false.
    """

    owner: SummedForward | MoELayer
    group: dist.ProcessGroup

    def left_to(self, hidden: Tensor) -> SmallSums | None:
        """What sums and norms tensors of this one's shape in a launch; None where nothing does."""
        if torch.compiler.is_compiling():
            return None
        found = small_sums(self.group)
        return found if found is not None and found.takes_rows(hidden) else None


@dataclass(frozen=True, slots=True)
class LayerForm:
    """A layer's children by what they do.

    Attributes:
        first, second: norms before mixer and MLP.
        mixer: attention or what stands in its place, and its argument for hidden states.
        passed: its other arguments, which are the layer's own.
        defaults: of the layer's arguments.
        mlp: MLP or MoE block.
        answers_tuple: whether the layer answers with a tuple of one.
        mixer_sum, mlp_sum: what sums ranks' results as the last thing in mixer and MLP.
    """

    first: nn.Module
    second: NormForward
    mixer: nn.Module
    hidden_name: str
    passed: tuple[str, ...]
    defaults: dict[str, Any]
    mlp: nn.Module
    answers_tuple: bool
    mixer_sum: LastSum | None
    mlp_sum: LastSum | None


class LayerForward:
    """The forward of a recognised decoder layer.

    Attributes:
        follower: the norm that is called with the layer's answer; it gets its result in the launch
            that makes the answer.
    """

    def __init__(self, layer: nn.Module, form: LayerForm) -> None:
        self.layer, self.form = layer, form
        self.follower: NormForward | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's own."""
        form = self.form
        given, extra = bind(self.layer, args, kwargs)
        residual = next(iter(given.values()))
        if form.second.wants_gradients(residual):
            return type(self.layer).forward(self.layer, *args, **kwargs)
        own = form.defaults | given
        named = {name: own[name] for name in form.passed}
        normed_first = form.first(residual)
        with _unsummed(form.mixer_sum, residual) as add_rms_norm:
            mixed = form.mixer(**{form.hidden_name: normed_first}, **named, **extra)
        mixed = mixed[0] if isinstance(mixed, tuple) else mixed
        normed, residual = add_rms_norm(mixed, residual, form.second.norm)
        last = None if self.follower is None else form.mlp_sum
        with _unsummed(last, residual) as add_rms_norm:
            out = form.mlp(normed)
        out = (out[0] if isinstance(out, tuple) else out).view(residual.shape)
        if self.follower is None:
            total = residual + out
        else:
            ready, total = add_rms_norm(out, residual, self.follower.norm)
            self.follower.ready = (total, ready)
        return (total,) if form.answers_tuple else total


AddNorm = Callable[[Tensor, Tensor, Norm], tuple[Tensor, Tensor]]
"""x, residual, norm -> the norm of x + residual, and that sum."""


@contextmanager
def _unsummed(last: LastSum | None, hidden: Tensor) -> Iterator[AddNorm]:
    """The call inside gives a rank's own results where what this yields can sum them."""
    sums = None if last is None else last.left_to(hidden)
    if last is None or sums is None:
        yield dense.add_rms_norm
        return
    last.owner.sums = False
    try:
        yield sums.add_rms_norm
    finally:
        last.owner.sums = True


def recognise_layer(
    call: Call, observed: Observation, norms: dict[str, NormForward]
) -> LayerForward | Unrecognised:
    """A layer's parts, from its observed call. `norms` are the recognised ones, by path."""
    children = observed.children(call.path)
    x = call.input
    first = next((c for c in children if c.path in norms and c.input is x), None)
    if first is None:
        return Unrecognised("its input does not go to a recognised norm first")
    mixer = _called_with(children, first.output)
    second = next(
        (c for c in children if c.path in norms and c is not first and c.input is not x), None
    )
    if mixer is None or second is None:
        return Unrecognised("it is not two parts with a norm before each")
    mlp = _called_with(children, second.output)
    known = {id(c) for c in (first, mixer, second, mlp)}
    strangers = [c.path for c in children if id(c) not in known]
    if mlp is None or strangers or mlp is mixer:
        return Unrecognised(
            "it is not two parts with a norm before each"
            + (f"; it also calls {', '.join(strangers)}" if strangers else "")
        )
    if len(mlp.given) + len(mlp.extra) != 1:
        return Unrecognised("its MLP takes more than hidden states")
    name, *others = mixer.given
    others = [other for other in (*others, *mixer.extra) if other not in call.extra]
    told = mixer.given | mixer.extra
    own = parameter_defaults(type(call.module)) | call.given
    for other in others:
        if other not in own or own[other] is not told[other]:
            return Unrecognised(f"it gives its mixer a {other} of its own")
    if any(told.get(other) is not value for other, value in call.extra.items()):
        return Unrecognised("it keeps arguments from its mixer")
    if isinstance(call.output, tuple) and len(call.output) != 1:
        return Unrecognised("it answers with more than hidden states")
    form = LayerForm(
        first=first.module,
        second=norms[second.path],
        mixer=mixer.module,
        hidden_name=name,
        passed=tuple(others),
        defaults=parameter_defaults(type(call.module)),
        mlp=mlp.module,
        answers_tuple=isinstance(call.output, tuple),
        mixer_sum=_last_sum(mixer, observed),
        mlp_sum=_last_sum(mlp, observed),
    )
    return LayerForward(call.module, form)


def _last_sum(part: Call, observed: Observation) -> LastSum | None:
    """What makes a part's answer as a sum over ranks."""
    if isinstance(part.module, MoELayer):
        group = part.module.last_sum
        return None if group is None else LastSum(part.module, group)
    for child in observed.children(part.path):
        made = child.module.__dict__.get("forward")
        if isinstance(made, SummedForward) and child.output is part.first_output:
            return LastSum(made, made.group) if made.module.bias is None else None
    return None


def _called_with(children: list[Call], tensor: Any) -> Call | None:
    """The one child whose first argument is this tensor."""
    found = [child for child in children if child.input is tensor]
    return found[0] if len(found) == 1 else None


def layer_error(made: LayerForward, call: Call) -> float:
    """How far the layer's forward is from its observed answer.

    In half precision a token whose experts are nearly tied may get others after another rounding:
    there it is the median of the tokens' deviations; each relative to the largest output.
    """
    with torch.no_grad():
        answer = made(**call.given, **call.extra)
    ours: Tensor = answer[0] if isinstance(answer, tuple) else answer
    wanted = call.first_output
    if ours.shape != wanted.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    deviation = (ours.double() - wanted.double()).abs().amax(-1) / wanted.double().abs().max()
    half = wanted.dtype in (torch.float16, torch.bfloat16)
    return float((deviation.median() if half else deviation.max()).item())


def layer_tolerance(dtype: torch.dtype) -> float:
    """Of `layer_error`: a layer is two blocks, one behind the other."""
    return 2 * tolerance(dtype)
