"""One forward pass over random tokens, with every module's call kept: what dense parts are
recognised from, and compared with.

Attention modules that call Transformers' attention interface do so with a function of ours for
that pass, which keeps what it was given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moetor.huggingface.experts_form import Unrecognised

OBSERVED = (2, 12)
_NAME = "moetor_observed"
_PLACEHOLDERS = ("_token_id", "_token_index")
_FIRST_ID = 3


@dataclass(frozen=True, slots=True)
class Call:
    """A module's call: arguments by the name of its forward's parameter, and its answer.

    Attributes:
        given: named parameters; those that were left out are not there.
        extra: what fell into `**kwargs`.
    """

    path: str
    module: nn.Module
    given: dict[str, Any]
    extra: dict[str, Any]
    output: Any

    @property
    def input(self) -> Any:
        """The first argument."""
        return next(iter(self.given.values()), None)

    @property
    def first_output(self) -> Any:
        """The answer, or its first part."""
        return self.output[0] if isinstance(self.output, tuple) else self.output


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A call of the attention interface."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    named: dict[str, Any]
    output: Tensor


@dataclass(slots=True)
class Observation:
    """What happened, by path; modules called more than once are left out.

    Attributes:
        watched: whether attention was that of `causal_attention`.
        attention: calls of the attention interface, by the id of the module.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    watched: bool = False
    attention: dict[int, AttentionCall] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    def children(self, path: str) -> list[Call]:
        """Calls of a module's direct children, in their order."""
        prefix = f"{path}." if path else ""
        return [
            call
            for name, call in self.calls.items()
            if name.startswith(prefix) and name != path and "." not in name[len(prefix) :]
        ]


def is_own(module: nn.Module) -> bool:
    """Whether a module's forward is its class's own and not wrapped (device map, parallelism)."""
    return "forward" not in module.__dict__


def observe(model: nn.Module) -> Observation | Unrecognised:
    """Runs the model, first with attention observed, then, where that fails, as it is."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return Unrecognised("the model has no Transformers configuration to make tokens for")
    try:
        ids = random_ids(config)
    except (AttributeError, RuntimeError) as error:
        return Unrecognised(f"no tokens can be made for it: {error}")
    failure: Exception | None = None
    for watched in (True, False):
        found = Observation(watched=watched)
        try:
            with torch.no_grad(), recording(model, found):
                if watched:
                    with attention_watched(model, found):
                        run(model, ids)
                else:
                    run(model, ids)
        except Exception as error:  # a family may raise anything on text alone
            failure = error
            continue
        return found
    return Unrecognised(f"it cannot be run on text alone: {failure}")


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of texts without a past."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False)[0]
    return logits


def random_ids(config: Any) -> Tensor:
    """[B, S] ids without placeholders of pictures and the like."""
    text = config.get_text_config(decoder=True)
    taken = {
        value
        for name, value in (*config.to_dict().items(), *text.to_dict().items())
        if name.endswith(_PLACEHOLDERS) and isinstance(value, int)
    }
    free = torch.tensor([i for i in range(_FIRST_ID, int(text.vocab_size)) if i not in taken])
    rng = torch.Generator().manual_seed(len(taken))
    return torch.take(free, torch.randint(len(free), OBSERVED, generator=rng))


@contextmanager
def recording(model: nn.Module, found: Observation) -> Iterator[None]:
    """Keeps every module's call for the time of the context."""

    def keep(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if path in found.repeated or found.calls.pop(path, None) is not None:
            found.repeated.add(path)
            return
        given, extra = bind(module, args, kwargs)
        found.calls[path] = Call(path, module, given, extra, output)

    handles = []
    for path, module in model.named_modules():

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            keep(path, module, args, kwargs, output)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bind(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's arguments by the names of the class's own forward, and those without a name."""
    names = parameter_names(type(module))
    named = dict(zip(names, args, strict=False)) | kwargs
    given = {name: named[name] for name in names if name in named}
    return given, {name: value for name, value in kwargs.items() if name not in names}


def parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Named parameters of a class's forward, without self."""
    return _parameter_names(kind.forward)


@functools.cache  # asked at every call of a fused module
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(parameter.name for parameter in parameters if parameter.kind not in kinds)


def parameter_defaults(kind: type[nn.Module]) -> dict[str, Any]:
    """Defaults of a class's forward, by parameter."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@contextmanager
def attention_watched(model: nn.Module, found: Observation) -> Iterator[None]:
    """Attention modules call a function of ours for the time of the context."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **named: Any
    ) -> tuple[Tensor, None]:
        output = causal_attention(query, key, value)
        found.attention[id(module)] = AttentionCall(
            query, key, value, attention_mask, named, output
        )
        return output, None

    with attention_by(model, attend):
        yield


@contextmanager
def attention_by(model: nn.Module, function: Any) -> Iterator[None]:
    """The model attends by `function` for the time of the context."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    before = text._attn_implementation_internal
    ALL_ATTENTION_FUNCTIONS.register(_NAME, function)
    text._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        text._attn_implementation_internal = before
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(_NAME, None)


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **named: Any
) -> tuple[Tensor, None]:
    """`causal_attention` as a function of the attention interface."""
    return causal_attention(query, key, value), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, S, Hq, Dv] for [B, H, S, D]: plain causal attention, the same for both sides of a
    comparison.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
    raw = query.float() @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    mask = torch.ones(raw.shape[-2:], dtype=torch.bool, device=raw.device).tril()
    weights = raw.masked_fill(~mask, -torch.inf).softmax(-1)
    out: Tensor = weights @ values
    return out.to(value.dtype).transpose(1, 2).contiguous()
