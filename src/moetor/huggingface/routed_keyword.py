"""`return_routed_experts=True` of a fused model's forward and `generate`.

The ids [T, L, K] come as `routed_experts` of the named outputs, T sequence by sequence: what
`moetor.replay_routing` takes for a forward pass over the same tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from moetor.errors import InputError
from moetor.huggingface.routed_experts import RoutingRecord, record_routing

KEYWORD = "return_routed_experts"


def offer_keyword(model: nn.Module) -> None:
    """Makes a fused model take the keyword."""
    call = _Call()
    model.register_forward_pre_hook(call.begin, with_kwargs=True)
    model.register_forward_hook(call.end, always_call=True)
    if hasattr(model, "generate"):
        model.__dict__["generate"] = RoutedGenerate(model)


def withdraw_keyword(model: nn.Module) -> None:
    """Takes it away again."""
    for hooks, options in (
        (model._forward_pre_hooks, [model._forward_pre_hooks_with_kwargs]),
        (model._forward_hooks, [model._forward_hooks_always_called]),
    ):
        for number, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _Call):
                del hooks[number]
                for option in options:
                    option.pop(number, None)
    if isinstance(model.__dict__.get("generate"), RoutedGenerate):
        del model.__dict__["generate"]


class _Call:
    """Hooks before and after a model's forward: they record while one that was asked to runs."""

    def __init__(self) -> None:
        self.open: list[tuple[ExitStack, RoutingRecord] | None] = []

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Takes the keyword out and starts recording."""
        kwargs = dict(kwargs)
        if not kwargs.pop(KEYWORD, False):
            if self.open:
                self.open.append(None)
            return args, kwargs
        if kwargs.get("return_dict") is False:
            raise InputError(f"{KEYWORD}=True needs named outputs; leave return_dict at True")
        stack = ExitStack()
        self.open.append((stack, stack.enter_context(record_routing(model))))
        return args, kwargs

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Stops recording, also after an error, and adds what was recorded."""
        if not self.open:
            return
        entry = self.open.pop()
        if entry is None:
            return
        stack, record = entry
        stack.close()
        if output is not None:
            output["routed_experts"] = told(record, 1)


class RoutedGenerate:
    """The `generate` of a fused model: its own, and the keyword."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, return_routed_experts: bool = False, **kwargs: Any) -> Any:
        """As the model's own `generate`.

        Args:
            return_routed_experts: add `routed_experts` to the named outputs: of every token that
                the model has read, which is all but the last one of each sequence.

        Raises:
            InputError: without `return_dict_in_generate=True`, or for a search that runs tokens
                which are not in its result.
        """
        own = type(self.model).generate
        if not return_routed_experts:
            return own(self.model, *args, **kwargs)
        given = kwargs.get("generation_config") or self.model.generation_config

        def asked(name: str) -> Any:
            return kwargs.get(name, getattr(given, name, None))

        if not asked("return_dict_in_generate"):
            raise InputError(f"{KEYWORD}=True needs return_dict_in_generate=True, for its output")
        if (asked("num_beams") or 1) > 1 or kwargs.get("assistant_model") is not None:
            raise InputError(
                f"{KEYWORD}=True is for greedy search and sampling; beams and assistants run "
                "tokens that are not in the result. Use moetor.record_routing to have those too"
            )
        if asked("prompt_lookup_num_tokens"):
            raise InputError(f"{KEYWORD}=True cannot be used with prompt_lookup_num_tokens")
        with record_routing(self.model) as record:
            output = own(self.model, *args, **kwargs)
        output["routed_experts"] = told(record, output.sequences.shape[0])
        return output


def told(record: RoutingRecord, sequences: int) -> Tensor | dict[str, Tensor]:
    """Ids [T, L, K]; by path where layers see different tokens or have different K."""
    try:
        return record.by_sequence(sequences)
    except InputError:
        return record.by_layer
