"""Recording and replaying the routing of a fused model, for expert statistics and for training with
router replay.

Shape letters: T tokens, L layers, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from moetor.errors import FusionError, InputError
from moetor.huggingface.modules import fused_modules
from moetor.layer.context import ForwardContext, forward_context
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
        """Chosen experts, int32 [T, L, K]; the number of experts marks a dropped slot.

        Raises:
            InputError: layers with different K, or not called yet.
        """
        return self._recorder.ids(list(self._paths.values()))

    def ids_of(self, layer: str) -> Tensor:
        """The same for one layer, [T, K]."""
        return self._recorder.ids([self._paths[layer]])[:, 0]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Records which experts every token goes to, for the forward passes inside the `with` block.

    Raises:
        FusionError: the model is not fused.
    """
    recorder = RoutingRecorder()
    record = RoutingRecord(recorder, _names(model))
    with forward_context(ForwardContext(recorder=recorder)):
        yield record


@contextmanager
def replay_routing(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Makes every layer use prescribed experts; weights still follow from the model's own scores.

    Args:
        ids: [T, L, K], as `RoutingRecord.ids` gives them; forward passes take them in order.

    Raises:
        FusionError: the model is not fused.
        InputError: `ids` are not for this model.
    """
    names = list(_names(model).values())
    if ids.dim() != 3 or ids.shape[1] != len(names) or ids.is_floating_point():
        raise InputError(
            f"ids of shape {list(ids.shape)} and dtype {ids.dtype} were given; this model takes "
            f"integers [tokens, {len(names)}, top_k]"
        )
    replay = RoutingReplay({name: ids[:, layer] for layer, name in enumerate(names)})
    with forward_context(ForwardContext(replay=replay)):
        yield


def _names(model: nn.Module) -> dict[str, str]:
    names = {path: module.name for path, module in fused_modules(model)}
    if not names:
        raise FusionError("the model is not fused; call moetor.fuse(model) first")
    return names
