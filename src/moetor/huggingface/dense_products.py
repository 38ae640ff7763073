"""Linear modules that are called with one tensor become one product, and gated MLPs one product
and a down projection.

The weights are packed into one buffer and the modules' parameters become views of it, so that
names stay and no memory is doubled. Each module keeps its place and gets a forward that takes its
part of the common product.

Shape letters: T tokens, H hidden, N outputs of all, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetor.config import Activation
from moetor.kernels import dense

ACTIVATIONS = tuple(Activation(name=name) for name in ("silu", "gelu_tanh", "gelu", "relu"))


def joinable(modules: Sequence[Any]) -> bool:
    """Whether these are plain linear modules of one depth, dtype, device and use of a bias."""
    kinds = set()
    for module in modules:
        if type(module) is not nn.Linear:
            return False
        weight = module.weight
        facts = (weight.shape[1], weight.dtype, weight.device, weight.requires_grad)
        kinds.add((*facts, module.bias is None))
    return len(kinds) == 1 and len(modules) > 1


def packed(modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weights [N, H] and biases [N] one after another, in new memory."""
    weight = torch.cat([module.weight.detach() for module in modules])
    if modules[0].bias is None:
        return weight, None
    return weight, torch.cat([module.bias.detach() for module in modules])


class JoinedProduct:
    """The product of several linear modules with one input.

    It is computed when the first of them is called, and kept until each has taken its part or one
    is called with another tensor. Where gradients are wanted, or a parameter has been moved out of
    the buffer (by `model.to`), each module computes for itself.

    Args:
        modules: as `joinable` wants them; their parameters are packed now.
        contiguous: whether parts are copied out of the product where they are not contiguous, for
            code that takes views of them.
    """

    def __init__(self, modules: Sequence[nn.Linear], *, contiguous: bool) -> None:
        self.modules = list(modules)
        self.contiguous = contiguous
        self.sizes = [module.weight.shape[0] for module in modules]
        self.weight, self.bias = packed(self.modules)
        self._share(self.weight, self.bias)
        self.input: Tensor | None = None
        self.parts: list[Tensor | None] = []

    def _share(self, weight: Tensor, bias: Tensor | None) -> None:
        weights = weight.split(self.sizes)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        for module, part, bias_part in zip(self.modules, weights, biases, strict=True):
            module.weight.data = part
            if bias_part is not None:
                module.bias.data = bias_part

    def install(self) -> None:
        """Gives each module its forward."""
        for place, module in enumerate(self.modules):
            module.__dict__["forward"] = JoinedPart(self, place)

    def remove(self) -> None:
        """Gives each module its own forward and memory again."""
        for module in self.modules:
            module.__dict__.pop("forward", None)
            module.weight.data = module.weight.data.clone()
            if module.bias is not None:
                module.bias.data = module.bias.data.clone()

    def whole(self) -> bool:
        """Whether the parameters are still the views that were made of them."""
        if torch.compiler.is_compiling():
            return True
        at = self.weight.data_ptr()
        for module, size in zip(self.modules, self.sizes, strict=True):
            if module.weight.data_ptr() != at:
                return False
            at += size * self.weight.stride(0) * self.weight.element_size()
        return True

    def wants_gradients(self, x: Tensor) -> bool:
        """Whether a call must be recorded."""
        return torch.is_grad_enabled() and (x.requires_grad or self.modules[0].weight.requires_grad)

    def part(self, place: int, x: Tensor) -> Tensor:
        """What module number `place` answers to `x` [..., H]."""
        if self.input is x and self.parts[place] is not None:
            return self._take(place)
        if self.wants_gradients(x) or not self.whole():
            return self.alone(place, x)
        product = dense.linear(x, self.weight, self.bias)
        self.input, self.parts = x, list(self.split(product))
        return self._take(place)

    def alone(self, place: int, x: Tensor) -> Tensor:
        """What module number `place` computes for itself."""
        module = self.modules[place]
        return torch.nn.functional.linear(x, module.weight, module.bias)

    def split(self, product: Tensor) -> Sequence[Tensor]:
        """The modules' answers, from [..., N]."""
        parts: tuple[Tensor, ...] = product.split(self.sizes, dim=-1)
        return parts

    def _take(self, place: int) -> Tensor:
        taken = self.parts[place]
        assert taken is not None, "each part is taken once"
        self.parts[place] = None
        if all(part is None for part in self.parts):
            self.input, self.parts = None, []
        return taken.contiguous() if self.contiguous else taken


class JoinedPart:
    """The forward of one of the modules of a `JoinedProduct`."""

    def __init__(self, product: JoinedProduct, place: int) -> None:
        self.product, self.place = product, place

    def __call__(self, input: Tensor) -> Tensor:
        """[..., N of this module] for [..., H]."""
        return self.product.part(self.place, input)


class FewRowsForward:
    """The forward of a linear module: vector sums for a few rows."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        """[..., N] for [..., H]."""
        weight, bias = self.module.weight, self.module.bias
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            return torch.nn.functional.linear(input, weight, bias)
        return dense.linear(input, weight, bias)


class GatedMLPForward:
    """The forward of an MLP `down(activation(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(
        self, mlp: nn.Module, product: JoinedProduct, down: str, activation: Activation
    ) -> None:
        self.mlp, self.product, self.down, self.activation = mlp, product, down, activation

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """[..., H] for [..., H]."""
        (x,) = (*args, *kwargs.values())
        if self.product.wants_gradients(x) or not self.product.whole():
            original: Tensor = type(self.mlp).forward(self.mlp, x)
            return original
        product = self.product
        act = dense.gated_linear(x, product.weight, product.bias, self.activation)
        down: Any = self.mlp._modules[self.down]
        out: Tensor = down(act)
        return out
