"""Tiny random models of the families that are fused whole, with nothing in them degenerate.

Weights are normal with variance 1 / fan_in, biases and norms are drawn too, so that an option that
is ignored shows in the numbers. Shape letters: E experts, H hidden, I intermediate, J rows of the
first product.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from moetor.config import Activation, RouterConfig
from moetor.layer import MoELayer

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A model small enough to build for every test.

    Attributes:
        family: names the classes: `<family>Config` and `<family>ForCausalLM`.
        options: of the configuration, over the common ones.
        block: class name of its MoE blocks.
        blocks: how many it has.
        router, activation: what must be recognised. `None` for models that are not fused whole.
        implementation: how Transformers runs the original's experts; its default needs sizes that
        are
            multiples of 16 bytes, `eager` takes any.
        up_scale: factor on the first product's weights, so that a clamp is reached.
    """

    id: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    block: str = ""
    blocks: int = 2
    router: RouterConfig | None = None
    activation: Activation = field(default_factory=Activation)
    implementation: str | None = None
    up_scale: float = 1.0

    @property
    def config_class(self) -> Any:
        return getattr(transformers, f"{self.family}Config")

    @property
    def model_class(self) -> Any:
        return getattr(transformers, f"{self.family}ForCausalLM")

    def config(self, **options: Any) -> Any:
        return self.config_class(**{**_COMMON, **self.options, **options})

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """The model in eval mode with random values; the same seed gives the same model."""
        model = self.model_class(self.config(**options)).eval()
        randomise(model, seed=seed, up_scale=self.up_scale)
        if self.implementation is not None:
            model.set_experts_implementation(self.implementation)
        return model.to(dtype)


def _case(
    id: str,
    family: str,
    block: str,
    *,
    router: dict[str, Any],
    blocks: int = 2,
    activation: Activation | None = None,
    implementation: str | None = None,
    up_scale: float = 1.0,
    **options: Any,
) -> Tiny:
    return Tiny(
        id=id,
        family=family,
        options=options,
        block=block,
        blocks=blocks,
        router=RouterConfig(**({"num_experts": 8, "top_k": 2} | router)),
        activation=activation or Activation(),
        implementation=implementation,
        up_scale=up_scale,
    )


MIXTRAL = _case(
    "mixtral",
    "Mixtral",
    "MixtralSparseMoeBlock",
    router={"renormalize": True},
    implementation="eager",
    num_local_experts=8,
    num_experts_per_tok=2,
    intermediate_size=37,
)
QWEN2 = _case(
    "qwen2_moe",
    "Qwen2Moe",
    "Qwen2MoeSparseMoeBlock",
    router={"num_experts": 10, "top_k": 3},
    num_experts=10,
    num_experts_per_tok=3,
    intermediate_size=48,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    norm_topk_prob=False,
)
QWEN3 = _case(
    "qwen3_moe",
    "Qwen3Moe",
    "Qwen3MoeSparseMoeBlock",
    router={"top_k": 3, "renormalize": True},
    implementation="eager",
    hidden_size=66,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=3,
    intermediate_size=48,
    moe_intermediate_size=21,
    norm_topk_prob=True,
)
OLMOE = _case(
    "olmoe",
    "Olmoe",
    "OlmoeSparseMoeBlock",
    router={"top_k": 4},
    num_experts=8,
    num_experts_per_tok=4,
    intermediate_size=24,
    norm_topk_prob=False,
)
DEEPSEEK_V2 = _case(
    "deepseek_v2",
    "DeepseekV2",
    "DeepseekV2Moe",
    router={
        "top_k": 3,
        "num_groups": 4,
        "top_k_groups": 2,
        "group_score": "max",
        "group_mask": "zero",
        "scaling_factor": 3.0,
    },
    **_LATENT_ATTENTION,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=2,
    intermediate_size=48,
    moe_intermediate_size=24,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    routed_scaling_factor=3.0,
)
DEEPSEEK_V3 = _case(
    "deepseek_v3",
    "DeepseekV3",
    "DeepseekV3MoE",
    blocks=2,
    router={
        "top_k": 3,
        "scoring": "sigmoid",
        "renormalize": True,
        "renormalize_eps": 1e-20,
        "num_groups": 4,
        "top_k_groups": 2,
        "group_score": "top2_sum",
        "group_mask": "-inf",
        "scaling_factor": 2.5,
        "selection_bias": True,
    },
    **_LATENT_ATTENTION,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_mtp_layers=0,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    intermediate_size=48,
    moe_intermediate_size=24,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
)
GPT_OSS = _case(
    "gpt_oss",
    "GptOss",
    "GptOssMLP",
    router={"score_order": "after_topk"},
    activation=Activation(alpha=1.702, limit=1.5, up_shift=1.0),
    up_scale=2.0,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=2,
    intermediate_size=40,
    swiglu_limit=1.5,
    sliding_window=16,
)
GRANITE = _case(
    "granitemoe",
    "GraniteMoe",
    "GraniteMoeMoE",
    router={"top_k": 3, "score_order": "after_topk"},
    implementation="eager",
    hidden_size=72,
    num_local_experts=8,
    num_experts_per_tok=3,
    intermediate_size=33,
    embedding_multiplier=2.0,
    residual_multiplier=0.7,
    logits_scaling=0.5,
    attention_multiplier=0.2,
)

FAMILIES = (MIXTRAL, QWEN2, QWEN3, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS, GRANITE)


def _variant(base: Tiny, id: str, options: dict[str, Any], **router: Any) -> Tiny:
    assert base.router is not None
    return replace(
        base, id=id, options=base.options | options, router=replace(base.router, **router)
    )


# The same families with an option the other way round.
VARIANTS = (
    _variant(QWEN2, "qwen2_moe-renormalised", {"norm_topk_prob": True}, renormalize=True),
    _variant(QWEN3, "qwen3_moe-raw", {"norm_topk_prob": False}, renormalize=False),
    _variant(OLMOE, "olmoe-renormalised", {"norm_topk_prob": True}, renormalize=True),
    _variant(
        DEEPSEEK_V2,
        "deepseek_v2-greedy",
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        num_groups=1,
        top_k_groups=1,
        scaling_factor=1.0,
    ),
    _variant(
        DEEPSEEK_V3,
        "deepseek_v3-raw",
        {"norm_topk_prob": False},
        renormalize=False,
    ),
    _variant(
        DEEPSEEK_V3,
        "deepseek_v3-one-group",
        {"n_group": 1, "topk_group": 1},
        num_groups=1,
        top_k_groups=1,
        group_score="max",
        group_mask="zero",
    ),
    _variant(GPT_OSS, "gpt_oss-all-experts", {"num_experts_per_tok": 8}, top_k=8),
    _variant(MIXTRAL, "mixtral-top1", {"num_experts_per_tok": 1}, top_k=1),
)


def randomise(model: nn.Module, *, seed: int, up_scale: float = 1.0) -> None:
    """Draws every parameter and every floating-point selection bias anew."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        tensor.copy_(drawn * std + mean)

    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for path, module in model.named_modules():
            transposed = getattr(module, "is_transposed", False)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    fan_in = parameter.shape[1 if transposed else 2]
                    scale = 1.0 if name == "down_proj" else up_scale
                    normal(parameter, scale * fan_in**-0.5)
                elif parameter in embeddings:
                    normal(parameter, 1.0)
                elif parameter.dim() >= 2 and "bias" not in name:
                    normal(parameter, parameter[0].numel() ** -0.5)
                elif "norm" in path.rpartition(".")[2] and name == "weight":
                    normal(parameter, 0.2, 1.0)
                else:
                    normal(parameter, 0.3)
            for name, buffer in module.named_buffers(recurse=False):
                if name.endswith(("correction_bias", "expert_bias")):
                    normal(buffer, 0.3)


def some_ids(batch: int = 2, length: int = 17, *, seed: int = 1) -> Tensor:
    """Random token ids [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def some_hidden(
    size: int, tokens: int = 40, *, seed: int = 2, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal hidden states [1, T, H]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, tokens, size), generator=generator).to(dtype)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor | None = None) -> Tensor:
    logits: Tensor = model(input_ids=some_ids() if ids is None else ids).logits
    return logits


def block_paths(model: nn.Module, tiny: Tiny) -> list[str]:
    """Where the family's own block class stands in the model."""
    return [path for path, m in model.named_modules() if type(m).__name__ == tiny.block]


def classes_of(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that would be saved."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def safetensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a saved model, by the name that it has in its file."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names that differ, in presence, dtype or any bit."""
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(ours[name], theirs[name])
    ]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest deviation over the largest value of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all())
    a, b = ours.double(), theirs.double()
    return float((a - b).abs().max() / b.abs().max())


def fused_blocks(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def bound(dtype: torch.dtype) -> float:
    """Largest deviation between two correct computations of a block, relative to its largest
    output.

    float32: sums of about a hundred products in another order, 6e-8 each. Half precision: the one
    side rounds each of two products, an activation, a weighting and K additions where the other
    rounds once.
    """
    return 1e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps


def canonical(router: RouterConfig) -> RouterConfig:
    """One of the descriptions that say the same.

    Softmax over the kept logits is softmax over all, renormalised; over all experts it sums to one;
    an epsilon of 1e-20 is lost in float32; and precisions are told apart by half precision alone.
    """
    same: dict[str, Any] = {"gate_precision": "model", "weights_precision": "float32"}
    if router.scoring == "softmax" and router.score_order == "after_topk":
        same |= {"score_order": "before_topk", "renormalize": True}
    if router.scoring == "softmax" and router.top_k == router.num_experts:
        same |= {"score_order": "before_topk", "renormalize": False}
    if router.renormalize_eps <= 1e-15:
        same |= {"renormalize_eps": 0.0}
    return replace(router, **same)
