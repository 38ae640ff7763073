"""`verify`: a model before and after fusing, block by block, in its logits, and for the demo in
its perplexity.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetor.demo import heldout_text
from moetor.errors import FusionMismatchError
from moetor.huggingface.any_size import call_original
from moetor.huggingface.devices import find_device, find_dtype
from moetor.huggingface.fuse_options import FuseLevel, Progress, check_request
from moetor.huggingface.fusing import fuse, unfuse
from moetor.huggingface.loading import LoadOptions, load_tokenizer, stream_model
from moetor.huggingface.report import BlockReport
from moetor.huggingface.sources import DEMO
from moetor.huggingface.trial import relative_error, tolerance
from moetor.quant_config import QuantConfig
from moetor.quantization.method import quant_config

# Tokens of the comparison of logits, and of the demo's perplexity.
LOGITS_TOKENS = 32
PERPLEXITY_TOKENS = 4096
PERPLEXITY_WINDOW = 512
# The factor by which a number format may raise the demo's perplexity.
PERPLEXITY_LIMITS: dict[str, float] = {
    "fp8": 1.01,
    "int8": 1.01,
    "mxfp8": 1.01,
    "int4": 1.03,
    "nvfp4": 1.05,
    "mxfp4": 1.05,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCheck:
    """One block, fused against original.

    Attributes:
        max_error: largest deviation over the largest original output; None where nothing was
            compared.
        quantization_error: what quantising its experts did to their output on random input, by the
            norm; None where they were not quantised.
        note: why the block is not at level `block`, or what is wrong.
    """

    name: str
    level: str
    kernel: str | None
    max_error: float | None
    tolerance: float
    ok: bool
    note: str = ""
    quantization_error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """A whole model, fused against original.

    Attributes:
        logits_error: largest deviation of the logits over the largest original logit; in half
            precision that of the median token.
        logits_tolerance: what the dtype allows after all layers; None for quantised experts, whose
            error is no rounding error of the dtype.
        non_finite: parameters and buffers that hold NaN or infinity.
        perplexity: of the demo's held-out text, original and fused; None for other models.
        quantized: how many experts were quantised, and from how many bytes to how many.
        perplexity_limit: by which factor quantised experts may raise the demo's perplexity.
    """

    blocks: tuple[BlockCheck, ...]
    logits_error: float
    logits_tolerance: float | None
    non_finite: tuple[str, ...]
    perplexity: tuple[float, float] | None
    quantized: str | None = None
    perplexity_limit: float | None = None

    @property
    def logits_ok(self) -> bool:
        """Whether the logits agree; of quantised experts they need only be finite."""
        limit = math.inf if self.logits_tolerance is None else self.logits_tolerance
        return self.logits_error <= limit and (
            self.logits_tolerance is not None or math.isfinite(self.logits_error)
        )

    @property
    def perplexity_ok(self) -> bool:
        """Whether the perplexity is within its limit, where there is one."""
        if self.perplexity is None or self.perplexity_limit is None:
            return True
        original, fused = self.perplexity
        return fused <= original * self.perplexity_limit

    @property
    def ok(self) -> bool:
        """Whether everything agrees and every weight is finite."""
        blocks = all(block.ok for block in self.blocks)
        return blocks and self.logits_ok and self.perplexity_ok and not self.non_finite

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {**asdict(self), "ok": self.ok}


def verify(
    model: str | nn.Module,
    *,
    level: FuseLevel = "auto",
    kernel: str = "auto",
    quantization: str | QuantConfig | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compares a model with itself fused; a live model is given back as it was.

    Args:
        model: a folder, a hub id, `demo`, or a live Transformers model that is not fused.
        quantization: as for `fuse`. Blocks are compared before their experts are quantised; the
            report adds what quantising did to each, and to the logits and the perplexity. A live
            model is copied first, since quantising releases the original weights.

    Raises:
        CheckpointError: the model cannot be loaded.
        FusionError: a live model is fused already or in training mode.
        KernelRefusedError: the kernel is unknown or refuses.
    """
    check_request(level, kernel, quantization)
    quant = quant_config(quantization)
    if isinstance(model, str):
        options = LoadOptions(
            dtype=find_dtype(dtype),
            device=find_device(device),
            revision=revision,
            trust_remote_code=trust_remote_code,
            quantized_later=quant,
            kernel=kernel,
        )
        live: nn.Module = stream_model(model, options)[0]
    else:
        live = model if quant is None else copy.deepcopy(model)
    measured = _Measured(live, _demo_ids(live) if model == DEMO else None)
    limit = tolerance(next(live.parameters()).dtype)
    bad_weights = non_finite(live)
    try:
        report = fuse(
            live, level=level, kernel=kernel, quantization=quantization, progress=progress
        )
    except FusionMismatchError as mismatch:
        return _mismatch_report(str(mismatch), limit, bad_weights)
    try:
        error, perplexities = measured.compare(live)
    finally:
        if report.quantized is None:
            unfuse(live)
    # Layers add their errors, and each layer's error passes through the next ones.
    logits_limit = limit * max(1, len(report.blocks)) ** 0.5
    return VerifyReport(
        blocks=tuple(_check(block, limit) for block in report.blocks),
        logits_error=error,
        logits_tolerance=logits_limit if report.quantized is None else None,
        non_finite=bad_weights,
        perplexity=perplexities,
        quantized=report.quantized,
        perplexity_limit=None if quant is None else PERPLEXITY_LIMITS[quant.format],
    )


class _Measured:
    """The original's logits and perplexity, to compare the fused model with."""

    def __init__(self, model: nn.Module, text_ids_T: Tensor | None) -> None:
        self.ids_BT = _random_ids(model)
        self.logits = call_original(model, lambda: _logits(model, self.ids_BT))
        self.text_ids_T = text_ids_T
        self.perplexity: float | None = None
        if text_ids_T is not None:
            self.perplexity = call_original(model, lambda: perplexity(model, text_ids_T))

    def compare(self, model: nn.Module) -> tuple[float, tuple[float, float] | None]:
        """The error of the model's logits, and both perplexities where there is a text."""
        error = logits_error(_logits(model, self.ids_BT), self.logits)
        if self.text_ids_T is None or self.perplexity is None:
            return error, None
        return error, (self.perplexity, perplexity(model, self.text_ids_T))


def _check(block: BlockReport, limit: float) -> BlockCheck:
    return BlockCheck(
        name=block.name,
        level=block.level,
        kernel=block.kernel,
        max_error=block.max_error,
        tolerance=limit,
        ok=block.max_error is None or block.max_error <= limit,
        note=block.reason,
        quantization_error=block.quantization_error,
    )


def _mismatch_report(note: str, limit: float, not_finite: tuple[str, ...]) -> VerifyReport:
    failed = BlockCheck(
        name="", level="", kernel=None, max_error=None, tolerance=limit, ok=False, note=note
    )
    return VerifyReport(
        blocks=(failed,),
        logits_error=math.inf,
        logits_tolerance=limit,
        non_finite=not_finite,
        perplexity=None,
    )


def logits_error(ours: Tensor, original: Tensor) -> float:
    """Largest relative deviation of [1, T, V]; in half precision that of the median token.

    There two right computations round differently, which tips a near tie of some router and sends
    that one token elsewhere.
    """
    if ours.dtype in (torch.float32, torch.float64) or ours.shape != original.shape:
        return relative_error(ours, original)
    tokens = range(original.shape[1])
    return median(relative_error(ours[:, token], original[:, token]) for token in tokens)


def non_finite(model: nn.Module) -> tuple[str, ...]:
    """Names of what a checkpoint holds (parameters, and buffers such as DeepSeek-V3's selection
    bias) that is NaN or infinite.
    """
    return tuple(
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    )


@torch.no_grad()
def perplexity(model: nn.Module, ids_T: Tensor) -> float:
    """exp of the mean negative log likelihood of each next token, in windows that do not
    overlap.
    """
    total, count = 0.0, 0
    for window in ids_T.split(PERPLEXITY_WINDOW):
        if window.numel() < 2:
            continue
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        count += window.numel() - 1
    mean = total / count
    return math.exp(mean) if mean < math.log(sys.float_info.max) else mean * math.inf


def _demo_ids(model: nn.Module) -> Tensor:
    ids = load_tokenizer(DEMO)(heldout_text(), return_tensors="pt", verbose=False).input_ids[0]
    taken: Tensor = ids[:PERPLEXITY_TOKENS].to(next(model.parameters()).device)
    return taken


def _random_ids(model: nn.Module) -> Tensor:
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(vocabulary)
    ids = torch.randint(0, vocabulary, (1, LOGITS_TOKENS), generator=generator)
    return ids.to(next(model.parameters()).device)


@torch.no_grad()
def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT).logits
    return logits
