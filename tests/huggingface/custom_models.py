"""Models as they stand in somebody's own file: every expert is a module, the block routes in its
forward, and Transformers knows nothing of them.

`TinyMixtral` is written as Mixtral was in Transformers 4 and Grok-1's published file is, with the
names of either; `TinyDeepseek` as DeepSeek-V2's published file, with a gate of its own, shared
experts and tokens sorted by expert. Shape letters: B batch, S sequence, T tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

# Of the three products of an expert: gate, up, down.
NAMES = {
    "own": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w3", "w2"),
    "grok": ("linear", "linear_v", "linear_1"),
}


class TinyConfig(PreTrainedConfig):
    model_type = "moetor_test_tiny"

    def __init__(self, style: str = "mixtral", bias: bool = False, **kwargs: Any) -> None:
        self.style = style
        self.bias = bias
        self.vocab_size = kwargs.pop("vocab_size", 61)
        self.hidden_size = kwargs.pop("hidden_size", 32)
        self.intermediate_size = kwargs.pop("intermediate_size", 24)
        self.num_hidden_layers = kwargs.pop("num_hidden_layers", 2)
        self.num_experts = kwargs.pop("num_experts", 8)
        self.num_experts_per_tok = kwargs.pop("num_experts_per_tok", 3)
        super().__init__(**kwargs)


class Expert(nn.Module):
    def __init__(self, config: TinyConfig, width: int | None = None) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, width or config.intermediate_size
        self.names = NAMES.get(config.style, NAMES["own"])
        for name, (rows, cols) in zip(
            self.names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True
        ):
            self.add_module(name, nn.Linear(cols, rows, bias=config.bias))
        self.act_fn = nn.GELU() if config.style == "grok" else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class MixtralBlock(nn.Module):
    """Returns (hidden states, router logits), and routes in its own forward."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.renormalise = config.style != "grok"
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_experts)])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        shape = hidden_states.shape
        x_TH = hidden_states.view(-1, shape[-1])
        router_logits = self.gate(x_TH)
        weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        weights, chosen = torch.topk(weights, self.top_k, dim=-1)
        if self.renormalise:
            weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x_TH.dtype)
        out = torch.zeros_like(x_TH)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(mask[number])
            found = expert(x_TH[None, token].reshape(-1, shape[-1])) * weights[token, slot, None]
            out.index_add_(0, token, found.to(x_TH.dtype))
        return out.reshape(shape), router_logits


class DeepseekGate(nn.Module):
    """Answers with (ids, weights, auxiliary loss)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_group, self.topk_group = 4, 2
        self.routed_scaling_factor = 2.5
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TH = hidden_states.view(-1, hidden_states.shape[-1])
        logits = F.linear(x_TH.type(torch.float32), self.weight.type(torch.float32), None)
        scores = logits.softmax(dim=-1, dtype=torch.float32)
        groups = scores.view(x_TH.shape[0], self.n_group, -1).max(dim=-1).values
        kept = torch.topk(groups, k=self.topk_group, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(groups).scatter_(1, kept, 1)
        mask = mask.unsqueeze(-1).expand(-1, -1, scores.shape[1] // self.n_group)
        allowed = scores.masked_fill(~mask.reshape(scores.shape).bool(), 0.0)
        weights, ids = torch.topk(allowed, k=self.top_k, dim=-1, sorted=False)
        return ids, weights * self.routed_scaling_factor, None


class DeepseekBlock(nn.Module):
    """Shared experts beside routed ones; tokens are sorted by expert, as for inference."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.ep_rank = 0
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_experts)])
        self.gate = DeepseekGate(config)
        self.shared_experts = Expert(config, 2 * config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity = hidden_states
        ids, weights, _ = self.gate(hidden_states)
        x_TH = hidden_states.view(-1, hidden_states.shape[-1])
        routed = self.moe_infer(x_TH, ids, weights).view(*hidden_states.shape)
        return routed + self.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(self, x_TH: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], len(self.experts)))
        counts.scatter_(1, ids, 1)
        per_expert = counts.sum(dim=0).cpu().numpy()
        order = ids.view(-1).argsort()
        sorted_tokens = x_TH[order // ids.shape[1]]
        outputs, start = [], 0
        for number, count in enumerate(per_expert):
            if count:
                outputs.append(self.experts[number](sorted_tokens[start : start + count]))
                start += count
        outs = torch.cat(outputs, dim=0) if outputs else sorted_tokens.new_empty(0)
        back = torch.empty_like(outs)
        back[order] = outs
        return (
            back.view(*ids.shape, -1)
            .type(weights.dtype)
            .mul_(weights.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(back.dtype)
        )


class Layer(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        deepseek = config.style == "deepseek"
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = DeepseekBlock(config) if deepseek else MixtralBlock(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        steps = torch.arange(1, hidden_states.shape[1] + 1, dtype=hidden_states.dtype)
        mixed = hidden_states.cumsum(dim=1) / steps[:, None]  # in the place of attention
        answer = self.mlp(self.norm(mixed))
        out, logits = answer if isinstance(answer, tuple) else (answer, None)
        return hidden_states + out, logits


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    config: TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return CausalLMOutput(logits=self.lm_head(hidden))


def tiny_custom(style: str, seed: int = 0, **settings: Any) -> TinyModel:
    """A model of one style with random weights, biases included."""
    model = TinyModel(TinyConfig(style=style, **settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval().requires_grad_(False)
