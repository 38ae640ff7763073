"""`experts_implementation="moetor"`: the experts of every decorated family on our kernels, routing
in Transformers.

Shape letters: T tokens, K top_k, H hidden.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from moetor.config import RunnerConfig
from moetor.errors import UnsupportedError
from moetor.huggingface.experts_form import (
    Unrecognised,
    adopt_post_norm,
    experts_weights,
    recognise_experts,
)
from moetor.layer import ops
from moetor.layer.context import register_layer
from moetor.layer.experts import Experts
from moetor.layer.runner import MoERunner, make_runner
from moetor.parallel.dispatch import Dispatcher, LocalDispatcher
from moetor.quantization.method import make_method

NAME = "moetor"
_ATTRIBUTE = "_moetor_borrowed"


class BorrowedExperts:
    """What the ops find by name for a Transformers experts module: its own parameters, computed
    by us.

    A compiled graph holds the name for good, so the parameters are looked up at every call.
    """

    def __init__(self, module: nn.Module, top_k: int) -> None:
        self.module = weakref.ref(module)
        self.top_k = top_k
        self.experts = self._borrow(module)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.runner: MoERunner = make_runner(RunnerConfig())
        self.name = register_layer(self, type(module).__name__)

    @property
    def ranks(self) -> int:
        """1: Transformers itself reduces what its experts return."""
        return 1

    @property
    def num_ids(self) -> int:
        """E."""
        return self.routed_experts.config.num_experts

    @property
    def parallel(self) -> None:
        """None: Transformers itself spreads them."""
        return None

    @property
    def token_split(self) -> None:
        """None, likewise."""
        return None

    @property
    def routed_experts(self) -> Experts:
        """The experts with the parameters that the module holds now."""
        module = self.module()
        if module is not None and not self._follows(module):
            self.experts = self._borrow(module)
        return self.experts

    def _borrow(self, module: nn.Module) -> Experts:
        config = recognise_experts(module)
        if isinstance(config, Unrecognised):
            raise UnsupportedError(
                f"experts_implementation={NAME!r} cannot run {type(module).__name__}: "
                f"{config.reason}. Use experts_implementation='eager' for this model"
            )
        method = make_method(None, "auto", batch_invariant=False)
        experts = Experts(config, method, self.top_k, weights=experts_weights(module))
        adopt_post_norm(experts, module)
        return experts

    def _follows(self, module: nn.Module) -> bool:
        """Whether the module still holds the very parameters that were borrowed."""
        own = self.experts._parameters
        return all(own.get(name) is value for name, value in module._parameters.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied module borrows anew

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def borrowed_name(module: nn.Module, top_k: int) -> str:
    """The name under which the ops find this module's experts, the same for its whole life."""
    borrowed: BorrowedExperts | None = module.__dict__.get(_ATTRIBUTE)
    if borrowed is None:
        borrowed = BorrowedExperts(module, top_k)
        module.__dict__[_ATTRIBUTE] = borrowed
    return borrowed.name


def moetor_experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts function that Transformers calls: hidden [T, H], ids [T, K], weights [T, K] to
    [T, H].

    Ids equal to the local number of experts are dropped, as expert parallelism in Transformers
    marks them.

    Raises:
        UnsupportedError: the experts have a form that no description covers, or are to be trained.
    """
    if module.training and torch.is_grad_enabled() and _wants_gradients(module, hidden_states):
        raise UnsupportedError(
            f"experts_implementation={NAME!r} is for inference and gives no gradients; call "
            "model.eval(), or train with experts_implementation='grouped_mm'"
        )
    name = borrowed_name(module, top_k_index.shape[-1])
    out: Tensor = ops.transformers_moe_forward(
        hidden_states.contiguous(), top_k_weights, top_k_index, name
    )
    return out


def _wants_gradients(module: nn.Module, hidden_states: Tensor) -> bool:
    return hidden_states.requires_grad or any(p.requires_grad for p in module.parameters())


def moetor_fp8_experts_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Refuses: the FP8 experts of Transformers hold scales that no kernel here reads.

    Raises:
        UnsupportedError: always, saying what to use.
    """
    raise UnsupportedError(
        f"experts_implementation={NAME!r} does not run FP8 experts ({type(module).__name__}) yet; "
        "use 'grouped_mm' or 'batched_mm', or load the model dequantised"
    )
