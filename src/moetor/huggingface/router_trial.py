"""Asking a Transformers router: random copies of it, random tokens, and what it answers.

Shape letters: T tokens, K top_k, E router logits, H hidden.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moetor.config import RouterConfig
from moetor.huggingface.experts_form import Unrecognised
from moetor.kernels.gate import gate_product
from moetor.kernels.routing import route

BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "moe_statics.e_score_correction_bias")
# What a block may be given besides hidden states, and what its router calls it.
EXTRA_INPUTS = {"input_ids": "input_ids", "prev_router_hidden_states": "router_states"}

# The number of random tokens on which a description must agree.
PROBE_TOKENS = 64
# Spread of random biases: of the order of the scores, so that a bias that is ignored shows.
BIAS_STD = 0.3
# Means of the biases, one trial each: only with all scores negative does a group mask of 0 differ
# from one of -inf.
BIAS_SHIFTS = (0.0, -2.0)


def lookup(owner: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path below a module, without its gradient."""
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor), path
    return value.detach()


def random_like(tensor: Tensor, name: str, std: float, mean: float = 0.0) -> Tensor:
    """Normal values of this spread in the tensor's shape, dtype and (except meta) device.

    Args:
        name: tensors of different names get different values, also where their sizes agree.
    """
    device = "cpu" if tensor.device.type == "meta" else tensor.device
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(tensor.shape, generator=generator) * std + mean
    return drawn.to(device, tensor.dtype)


def random_twin(router: nn.Module, bias_shift: float) -> nn.Module:
    """A copy of the router with random values, on the CPU where the original has none.

    Args:
        bias_shift: mean of everything but matrices.
    """
    twin = copy.deepcopy(router)
    for path, owner in twin.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(
                    _filled(parameter, f"{path}.{name}", bias_shift), requires_grad=False
                )
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = _filled(buffer, f"{path}.{name}", bias_shift)
            elif buffer is not None and buffer.device.type == "meta":
                owner._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return twin.eval()


def _filled(tensor: Tensor, name: str, bias_shift: float) -> Tensor:
    if tensor.dim() == 2 and tensor.shape[0] > 1:
        return random_like(tensor, name, tensor.shape[-1] ** -0.5)
    return random_like(tensor, name, BIAS_STD, bias_shift)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a router answered to random tokens, and how it had to be asked.

    Attributes:
        logits_TE: as it gives them, None where it gives none.
        places: where weights and ids are among the values that it answers with; None where they
            were read off what its block does with them.
        answers: how many values these are.
    """

    hidden_TH: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    logits_dtype: torch.dtype
    logits_TE: Tensor | None = None
    batched: bool = False
    inputs: tuple[tuple[str, str], ...] = ()
    answers: int = 3
    places: Places | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Which of a router's values are the weights [.., K] and the ids [.., K].

    Attributes:
        mask: the ids are a mask [.., E] of the one chosen expert, empty for a dropped token.
    """

    weights: int = 1
    ids: int = 2
    mask: bool = False

    def read(self, answer: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K]."""
        weights, ids = answer[self.weights], answer[self.ids]
        if self.mask:
            mask_TE = ids.reshape(-1, ids.shape[-1])
            chosen, dropped = mask_TE.argmax(dim=-1), mask_TE.shape[-1]
            ids = torch.where(mask_TE.sum(dim=-1) > 0, chosen, dropped).unsqueeze(-1)
            weights = weights.reshape(-1, 1)
        return weights.reshape(-1, weights.shape[-1]), ids.reshape(-1, ids.shape[-1])


LOGITS_WEIGHTS_IDS = Places()


def try_router(
    router: nn.Module, hidden_size: int, dtype: torch.dtype, block_bias: Tensor | None
) -> Answer | Unrecognised:
    """Asks the router as its block does, with hidden states in `dtype`, which need not be that of
    its weights: some families keep their router in float32.
    """
    me = f"its router {type(router).__name__}"
    like = next(router.parameters(), None)
    if like is None:
        return Unrecognised(f"{me} holds no parameters")
    hidden_TH = like.new_empty((PROBE_TOKENS, hidden_size), dtype=dtype)
    hidden_TH = random_like(hidden_TH, "hidden states", 1.0)
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
    named: dict[str, Any] = {}
    for name, _ in parameters:
        if name in BIAS_NAMES and block_bias is not None:
            named[name] = block_bias
    unknown = [name for name in needed if name not in named]
    if unknown:
        return Unrecognised(f"{me} also takes {', '.join(unknown)}, which no description covers")
    if ("input_ids", "input_ids") in inputs:
        named["input_ids"] = random_token_ids(router, PROBE_TOKENS, hidden_TH.device)
    for batched in (False, True):
        try:
            with torch.no_grad():
                answer = router.forward(hidden_TH.unsqueeze(0) if batched else hidden_TH, **named)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            failure = Unrecognised(f"{me} could not be tried alone ({type(error).__name__})")
            continue
        read = _read_answer(router, answer)
        if read is None:
            return Unrecognised(f"{me} does not answer with (logits, weights, ids)")
        weights, ids, places = read
        logits = _logits(answer, weights, places)
        return Answer(
            hidden_TH=hidden_TH,
            weights_TK=weights,
            ids_TK=ids,
            logits_dtype=logits.dtype,
            logits_TE=logits.reshape(PROBE_TOKENS, -1),
            # a mask counts what each sequence has sent to an expert
            batched=batched or (places is not None and places.mask),
            inputs=inputs,
            answers=len(answer) if places is not None else 3,
            places=places,
        )
    return failure


def _read_answer(router: nn.Module, answer: Any) -> tuple[Tensor, Tensor, Places | None] | None:
    """Weights and ids [T, K] of a router's answer, and where they were.

    Known are (logits, weights, ids), perhaps with a fourth value; weights and ids in any order
    (LongCat in Transformers 5.17; DeepSeek's own files); (scores [T, E], logits) with a score for
    the chosen experts alone (Llama 4); (mask, weights, logits) (Switch Transformers); and tokens
    sorted by expert (JetMoE).
    """
    if not isinstance(answer, tuple):
        return None
    if len(answer) == 5 and isinstance(answer[3], list):
        return (*_unsorted(*answer[:4]), None)
    if not all(isinstance(item, Tensor) for item in answer if item is not None):
        return None
    if len(answer) == 2 and answer[0].shape == answer[1].shape and _are_floats(*answer):
        top_k = getattr(router, "top_k", 0)
        if not (isinstance(top_k, int) and 1 <= top_k <= answer[0].shape[-1]):
            return None
        weights, ids = answer[0].reshape(PROBE_TOKENS, -1).topk(top_k, dim=-1)
        return weights, ids, None
    for places in (LOGITS_WEIGHTS_IDS, Places(0, 1), Places(1, 0)):
        if max(places.weights, places.ids) >= len(answer) or len(answer) > 4:
            continue
        weights, ids = answer[places.weights], answer[places.ids]
        if weights is None or ids is None or not _are_floats(weights) or _are_floats(ids):
            continue
        if weights.shape == ids.shape:
            return (*places.read(answer), places)
    for places in (Places(1, 0, mask=True), Places(0, 1, mask=True)):
        weights, mask = answer[places.weights], answer[places.ids]
        one_each = len(answer) == 3 and weights.numel() * mask.shape[-1] == mask.numel()
        if one_each and _are_floats(weights) and not _are_floats(mask):
            return (*places.read(answer), places)
    return None


def _are_floats(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def _logits(answer: tuple[Any, ...], weights_TK: Tensor, places: Places | None) -> Tensor:
    """The router's logits, as far as it gives any; else its weights."""
    floats: list[Tensor] = [
        item for item in answer if isinstance(item, Tensor) and item.is_floating_point()
    ]
    if places in (None, LOGITS_WEIGHTS_IDS) and answer[0] is floats[0]:
        first: Tensor = floats[0]
        return first
    widest: Tensor = max(floats, key=lambda item: item.numel())
    return widest if widest.numel() > weights_TK.numel() else weights_TK


def _unsorted(
    order: Tensor, token_of: Tensor, gates: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Weights and ids [T, K] from slots that were sorted by expert (JetMoE).

    Args:
        order: number of each slot before sorting.
        token_of, gates: token and weight of each sorted slot.
        sizes: slots per expert.
    """
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    top_k = order.numel() // (int(token_of.max()) + 1)
    weights, ids = torch.empty_like(gates), torch.empty_like(order)
    weights[order], ids[order] = gates, experts.to(order.device)
    return weights.reshape(-1, top_k), ids.reshape(-1, top_k)


def random_token_ids(router: nn.Module, tokens: int, device: torch.device) -> Tensor:
    """Token ids [1, T] that a router with a table of token ids knows (DeepSeek-V4)."""
    tables = [buffer for buffer in router.buffers() if not buffer.is_floating_point()]
    known = min((table.shape[0] for table in tables if table.dim() == 2), default=2)
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, known, (1, tokens), generator=generator).to(device)


@dataclass(frozen=True, slots=True)
class Trial:
    """A router's random gate and biases, and its answer with them."""

    weight_EH: Tensor
    bias_E: Tensor | None
    selection_bias_E: Tensor | None
    answer: Answer


def reproduces(config: RouterConfig, trial: Trial, *, exact: bool) -> bool:
    """Whether the formula gives the router's own answer, slot order aside.

    Never for a router that takes or gives more than a formula does, or drops tokens.

    Args:
        exact: to the bit; otherwise weights may differ by a few roundings in their dtype.
    """
    answer = trial.answer
    if answer.inputs or answer.answers > 3 or int(answer.ids_TK.max()) >= config.num_logits:
        return False
    if config.gate_precision == "model" and trial.weight_EH.dtype != answer.hidden_TH.dtype:
        return False  # a gate that is kept in float32 multiplies in float32
    logits = gate_product(answer.hidden_TH, trial.weight_EH, trial.bias_E, config.gate_precision)
    # As if identity experts were ordinary ones: the router itself does not tell them apart.
    plain = replace(config, num_experts=config.num_logits, num_zero_experts=0)
    ours = route(logits, plain, trial.selection_bias_E, answer.hidden_TH.dtype)
    theirs_ids, theirs = answer.ids_TK, answer.weights_TK
    dense_a = torch.zeros((theirs_ids.shape[0], config.num_logits), device=theirs_ids.device)
    dense_b = torch.zeros_like(dense_a)
    dense_a.scatter_(1, theirs_ids.long(), theirs.float())
    dense_b.scatter_(1, ours.topk_ids.long(), ours.topk_weights)
    same_ids = torch.equal(theirs_ids.sort(dim=-1).values.int(), ours.topk_ids.sort(dim=-1).values)
    if exact:
        return same_ids and torch.equal(dense_a, dense_b)
    rtol = 2e-6 if theirs.dtype == torch.float32 else 2 * torch.finfo(theirs.dtype).eps
    return same_ids and torch.allclose(dense_a, dense_b, rtol=rtol, atol=rtol * 1e-2)
