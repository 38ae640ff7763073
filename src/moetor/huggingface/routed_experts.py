"""Recording and replaying the routing of a fused model, for expert statistics and for training with
router replay.

Shape letters: T tokens, L layers, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from moetor.errors import FusionError, InputError
from moetor.huggingface.modules import fused_modules
from moetor.layer.context import forward_context, get_forward_context
from moetor.layer.recording import RoutingRecorder, RoutingReplay


class RoutingRecord:
    """What `record_routing` gives: the ids of every token that passed."""

    def __init__(self, recorder: RoutingRecorder, paths: dict[str, str]) -> None:
        self._recorder = recorder
        self._paths = paths

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the recorded modules, in the order of the model."""
        return tuple(self._paths)

    @property
    def ids(self) -> Tensor:
        """Chosen experts, int32 [T, L, K]. Ids from the number of experts on are identity experts
        where the model has them; else that number is a dropped slot.

        Raises:
            InputError: layers with different K, or not called yet.
        """
        return self._recorder.ids(list(self._paths.values()))

    def by_sequence(self, sequences: int) -> Tensor:
        """The same when every forward pass had tokens of this many sequences, as `generate` does:
        the tokens of the first sequence, those of the second, ...
        """
        return self._recorder.ids(list(self._paths.values()), sequences)

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """The same as [T, K] by path, of every layer that was called."""
        called = {path: name for path, name in self._paths.items() if self._recorder.has(name)}
        return {path: self._recorder.ids([name])[:, 0] for path, name in called.items()}

    def ids_of(self, layer: str) -> Tensor:
        """The same for one layer, [T, K]."""
        return self._recorder.ids([self._paths[layer]])[:, 0]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Records which experts every token goes to, for the forward passes inside the `with` block.

    Raises:
        FusionError: the model is not fused.
    """
    context = get_forward_context()
    recorder = RoutingRecorder(context.recorder)
    record = RoutingRecord(recorder, _names(model))
    with forward_context(replace(context, recorder=recorder)):
        yield record


@contextmanager
def replay_routing(model: nn.Module, ids: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
    """Makes every layer use prescribed experts; weights still follow from the model's own scores.

    A layer whose router has no known formula can only be given what it chooses itself.

    Args:
        ids: [T, L, K], as `RoutingRecord.ids` and `return_routed_experts` give them; forward
            passes take them in order. Or [T, K] by path, as `RoutingRecord.by_layer` gives them,
            for a model whose layers see different tokens.

    Raises:
        FusionError: the model is not fused.
        InputError: `ids` are not for this model.
    """
    names = _names(model)
    if isinstance(ids, Tensor):
        if ids.dim() != 3 or ids.shape[1] != len(names) or ids.is_floating_point():
            raise InputError(
                f"ids of shape {list(ids.shape)} and dtype {ids.dtype} were given; this model "
                f"takes integers [tokens, {len(names)}, top_k]"
            )
        ids = {path: ids[:, layer] for layer, path in enumerate(names)}
    strangers = [path for path in ids if path not in names]
    wrong = [path for path, one in ids.items() if one.dim() != 2 or one.is_floating_point()]
    if strangers or wrong:
        raise InputError(
            f"ids for {', '.join(strangers or wrong)} are not integers [tokens, top_k] of a fused "
            "layer of this model"
        )
    replay = RoutingReplay({names[path]: one for path, one in ids.items()})
    with forward_context(replace(get_forward_context(), replay=replay)):
        yield


def _names(model: nn.Module) -> dict[str, str]:
    names = {path: module.name for path, module in fused_modules(model)}
    if not names:
        raise FusionError("the model is not fused; call moetor.fuse(model) first")
    return names
