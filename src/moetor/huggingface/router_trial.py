"""Asking a Transformers router: random copies of it, random tokens, and what it answers.

Shape letters: T tokens, K top_k, E router logits, H hidden.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moetor.config import RouterConfig
from moetor.huggingface.experts_form import Unrecognised
from moetor.kernels.routing import route

# What a block may be given besides hidden states, and what its router calls it.
EXTRA_INPUTS = {"input_ids": "input_ids", "prev_router_hidden_states": "router_states"}

# The number of random tokens on which a description must agree.
_PROBE_TOKENS = 64
# Spread of random biases: of the order of the scores, so that a bias that is ignored shows.
BIAS_STD = 0.3


def lookup(owner: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path below a module, without its gradient."""
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor), path
    return value.detach()


def random_like(tensor: Tensor, std: float) -> Tensor:
    """Normal values of this spread in the tensor's shape, dtype and (except meta) device."""
    device = "cpu" if tensor.device.type == "meta" else tensor.device
    generator = torch.Generator().manual_seed(tensor.numel())
    return (torch.randn(tensor.shape, generator=generator) * std).to(device, tensor.dtype)


def random_twin(router: nn.Module) -> nn.Module:
    """A copy of the router with random values, on the CPU where the original has none."""
    twin = copy.deepcopy(router)
    for owner in twin.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else BIAS_STD
                owner._parameters[name] = nn.Parameter(
                    random_like(parameter, std), requires_grad=False
                )
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = random_like(buffer, BIAS_STD)
            elif buffer is not None and buffer.device.type == "meta":
                owner._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return twin.eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a router answered to random tokens, and how it had to be asked."""

    hidden_TH: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    logits_dtype: torch.dtype
    batched: bool
    inputs: tuple[tuple[str, str], ...]
    answers: int


def try_router(
    router: nn.Module, hidden_size: int, block_bias: Tensor | None
) -> Answer | Unrecognised:
    """Asks the router as its block does."""
    me = f"its router {type(router).__name__}"
    like = next(router.parameters(), None)
    if like is None:
        return Unrecognised(f"{me} holds no parameters")
    hidden_TH = random_like(like.new_empty((_PROBE_TOKENS, hidden_size)), 1.0)
    parameters = list(inspect.signature(router.forward).parameters.items())[1:]
    inputs = tuple(
        (outer, inner) for outer, inner in EXTRA_INPUTS.items() if inner in dict(parameters)
    )
    needed = [
        name
        for name, parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY)
        and name != "input_ids"
    ]
    if len(needed) > 1 or (needed and block_bias is None):
        return Unrecognised(f"{me} also takes {', '.join(needed)}, which no description covers")
    more = (block_bias,) if needed else ()
    named = {}
    if ("input_ids", "input_ids") in inputs:
        named["input_ids"] = random_token_ids(router, _PROBE_TOKENS, hidden_TH.device)
    for batched in (False, True):
        try:
            with torch.no_grad():
                answer = router.forward(
                    hidden_TH.unsqueeze(0) if batched else hidden_TH, *more, **named
                )
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            failure = Unrecognised(f"{me} could not be tried alone ({type(error).__name__})")
            continue
        stranger = Unrecognised(f"{me} does not answer with (logits, weights, ids)")
        wanted = 4 if any(outer == "prev_router_hidden_states" for outer, _ in inputs) else 3
        if not (isinstance(answer, tuple) and len(answer) == wanted):
            return stranger
        weights, ids = (item.reshape(_PROBE_TOKENS, -1) for item in answer[1:3])
        if ids.is_floating_point() or weights.shape != ids.shape:
            return stranger
        return Answer(
            hidden_TH=hidden_TH,
            weights_TK=weights,
            ids_TK=ids,
            logits_dtype=answer[0].dtype,
            batched=batched,
            inputs=inputs,
            answers=len(answer),
        )
    return failure


def random_token_ids(router: nn.Module, tokens: int, device: torch.device) -> Tensor:
    """Token ids [1, T] that a router with a table of token ids knows (DeepSeek-V4)."""
    tables = [buffer for buffer in router.buffers() if not buffer.is_floating_point()]
    known = min((table.shape[0] for table in tables if table.dim() == 2), default=2)
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, known, (1, tokens), generator=generator).to(device)


def reproduces(
    config: RouterConfig, logits_TE: Tensor, selection_bias: Tensor | None, answer: Answer
) -> bool:
    """Whether the formula gives the router's own answer, slot order aside."""
    # As if identity experts were ordinary ones: the router itself does not tell them apart.
    plain = replace(config, num_experts=config.num_logits, num_zero_experts=0)
    ours = route(logits_TE, plain, selection_bias, answer.hidden_TH.dtype)
    theirs_ids, theirs = answer.ids_TK, answer.weights_TK
    dense_a = torch.zeros((theirs_ids.shape[0], config.num_logits), device=theirs_ids.device)
    dense_b = torch.zeros_like(dense_a)
    dense_a.scatter_(1, theirs_ids.long(), theirs.float())
    dense_b.scatter_(1, ours.topk_ids.long(), ours.topk_weights)
    same_ids = torch.equal(theirs_ids.sort(dim=-1).values.int(), ours.topk_ids.sort(dim=-1).values)
    # Ids decide in every dtype; weights may differ by the rounding of a softmax in that dtype.
    rtol = 2e-6 if theirs.dtype == torch.float32 else 2 * torch.finfo(theirs.dtype).eps
    return same_ids and torch.allclose(dense_a, dense_b, rtol=rtol, atol=rtol * 1e-2)
