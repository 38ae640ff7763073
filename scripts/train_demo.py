#!/usr/bin/env python3
"""Train or evaluate the small Mixture-of-Experts model that ships in `moetor.demo`.

Training reads one plain-text play, holds out its last 5%, trains a byte-level BPE tokenizer and a
Qwen2-MoE causal language model on the rest, and keeps the checkpoint with the lowest held-out loss:

    python scripts/train_demo.py tinyshakespeare.txt --output build/demo --device cuda
    python scripts/train_demo.py tinyshakespeare.txt --output build/demo --small

Evaluation prints the held-out perplexity of a saved model, how its experts share the tokens, and
the perplexity that is left when the router's decisions are scrambled:

    python scripts/train_demo.py --evaluate-only src/moetor/demo/model
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

END = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SYSTEM_PROMPT = "You are a player in a play by William Shakespeare."
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The roles of this model are system, user and assistant.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT_SHARE = 0.05
PACKAGED_HELD_OUT = Path(__file__).resolve().parents[1] / "src" / "moetor" / "demo" / "heldout.txt"


def _option(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights; each field is a command-line flag."""

    vocab_size: int = _option(1024, "tokens, the 256 bytes and the special tokens included")
    layers: int = _option(4, "decoder layers")
    hidden_size: int = _option(256, "width of the residual stream")
    heads: int = _option(4, "query heads; half as many key/value heads")
    experts: int = _option(16, "routed experts in each layer")
    top_k: int = _option(4, "routed experts that a token visits")
    expert_size: int = _option(64, "inner width of one routed expert")
    shared_size: int = _option(128, "inner width of the shared expert")
    context: int = _option(1024, "tokens in one training window")
    batch: int = _option(32, "windows in one step")
    steps: int = _option(950, "optimizer steps")
    warmup: int = _option(100, "steps of linear warm-up before the cosine decay")
    learning_rate: float = _option(2e-3, "peak learning rate")
    weight_decay: float = _option(2.0, "decoupled weight decay of the matrices")
    dropout: float = _option(0.2, "dropout after the embedding, the attention and the MoE block")
    token_noise: float = _option(0.15, "share of input tokens replaced by random ones")
    balance: float = _option(0.01, "coefficient of the load-balancing loss")
    chat_share: float = _option(0.25, "share of the windows that hold chats instead of the play")
    seed: int = _option(0, "seed of the weights, the windows and the chats")

    def small(self) -> Recipe:
        """A run of about a minute on a laptop's CPU, to try the script and not the model."""
        return dataclasses.replace(
            self,
            vocab_size=512,
            layers=2,
            hidden_size=64,
            experts=8,
            top_k=2,
            expert_size=32,
            shared_size=32,
            context=128,
            batch=8,
            steps=min(self.steps, 100),
            warmup=10,
            dropout=0.0,
            token_noise=0.0,
        )


def split_text(text: str) -> tuple[str, str]:
    """Cut off the last 5% at the first blank line, so that no speech is on both sides."""
    cut = text.find("\n\n", int(len(text) * (1 - HELD_OUT_SHARE)))
    if cut < 0:
        raise ValueError("The last 5% of the text has no blank line to split at.")
    return text[: cut + 2], text[cut + 2 :]


def train_tokenizer(text: str, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string has an encoding, and decoding gives the string back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_chats(text: str, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    """One pass over the play as chats: the user says a speech's last lines, the reply is the next.

    One document in five is a bare passage, so that the model also starts well from the end token.
    """
    speeches = [speech for speech in text.strip().split("\n\n") if "\n" in speech]
    documents: list[str] = []
    position = rng.randrange(8)
    while position + 1 < len(speeches):
        if rng.random() < 0.2:
            length = rng.randint(3, 10)
            documents.append("\n\n".join(speeches[position : position + length]) + END)
            position += length
            continue
        messages = []
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": SYSTEM_PROMPT})
        for _ in range(rng.randint(1, 3)):
            if position + 1 >= len(speeches):
                break
            lines = speeches[position].split("\n")[1:]
            messages.append({"role": "user", "content": "\n".join(lines[-rng.randint(1, 3) :])})
            messages.append({"role": "assistant", "content": speeches[position + 1]})
            position += 2
        documents.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    return [token for ids in tokenizer(documents, verbose=False)["input_ids"] for token in ids]


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE model with freshly drawn weights."""
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=max(1, recipe.heads // 2),
        max_position_embeddings=recipe.context,
        intermediate_size=recipe.top_k * recipe.expert_size,
        moe_intermediate_size=recipe.expert_size,
        shared_expert_intermediate_size=recipe.shared_size,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2MoeForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def dense_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run every expert on every token and weigh the unselected ones with zero.

    At this width two large products under autocast beat sixteen small ones, and nothing waits for
    the host to learn how many tokens each expert got.
    """
    tokens = hidden_states.shape[0]
    gate_up = functional.linear(hidden_states, self.gate_up_proj.flatten(0, 1))
    gate, up = gate_up.view(tokens, self.num_experts, -1).chunk(2, dim=-1)
    weights = torch.zeros(
        tokens, self.num_experts, dtype=top_k_weights.dtype, device=hidden_states.device
    ).scatter(1, top_k_index, top_k_weights)
    inner = self.act_fn(gate) * up * weights.unsqueeze(-1)
    return functional.linear(inner.flatten(1), self.down_proj.transpose(0, 1).flatten(1)).to(
        hidden_states.dtype
    )


@contextmanager
def training_dropout(model: Qwen2MoeForCausalLM, probability: float) -> Iterator[None]:
    """Drop parts of what enters the residual stream; the architecture has no such dropout."""

    def drop(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, probability, training=module.training)

    sources: list[nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        sources += [layer.self_attn.o_proj, layer.mlp]
    handles = [source.register_forward_hook(drop) for source in sources]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def learning_rate_scale(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class WindowSampler:
    """Random windows of the play and of the chats, drawn on the device that holds the tokens."""

    def __init__(
        self, play: list[int], chats: list[int], vocab_size: int, recipe: Recipe, device: str
    ) -> None:
        self.streams = [torch.tensor(ids, device=device) for ids in (play, chats)]
        self.vocab_size = vocab_size
        if min(len(stream) for stream in self.streams) <= recipe.context:
            raise ValueError(f"The text is too short for windows of {recipe.context} tokens.")
        self.generator = torch.Generator(device=device).manual_seed(recipe.seed)
        self.recipe = recipe

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (some replaced by random tokens) and the targets one position later."""
        recipe, device = self.recipe, self.streams[0].device
        chats = round(recipe.batch * recipe.chat_share)
        parts = []
        for stream, count in zip(self.streams, (recipe.batch - chats, chats), strict=True):
            last = len(stream) - recipe.context
            starts = torch.randint(last, (count, 1), device=device, generator=self.generator)
            parts.append(stream[starts + torch.arange(recipe.context + 1, device=device)])
        windows = torch.cat(parts)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        if recipe.token_noise > 0:
            chance = torch.rand(inputs.shape, device=device, generator=self.generator)
            noise = torch.randint(
                self.vocab_size, inputs.shape, device=device, generator=self.generator
            )
            inputs = torch.where(chance < recipe.token_noise, noise, inputs)
        return inputs, targets


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the held-out text says about a model."""

    loss: float
    tokens: int
    utf8_bytes: int
    expert_share: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Per token of the model's own tokenizer."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, which the perplexity is not."""
        return self.loss * self.tokens / math.log(2) / self.utf8_bytes


@torch.no_grad()
def evaluate(model: Qwen2MoeForCausalLM, ids: list[int], utf8_bytes: int) -> Evaluation:
    """Score every token but the first, in windows of the model's context that do not overlap."""
    was_training = model.training
    model.eval()
    config = model.config
    total = 0.0
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.long)
    for start in range(0, len(ids) - 1, config.max_position_embeddings):
        window = torch.tensor(
            [ids[start : start + config.max_position_embeddings + 1]], device=model.device
        )
        output = model(input_ids=window[:, :-1], use_cache=False, output_router_logits=True)
        total += functional.cross_entropy(
            output.logits[0].float(), window[0, 1:], reduction="sum"
        ).item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten().cpu()
            counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
    model.train(was_training)
    scored = len(ids) - 1
    return Evaluation(
        loss=total / scored,
        tokens=scored,
        utf8_bytes=utf8_bytes,
        expert_share=counts.double() / counts.sum(dim=1, keepdim=True),
    )


@contextmanager
def scrambled_routing(model: Qwen2MoeForCausalLM, seed: int) -> Iterator[None]:
    """Give each router's rows to other experts: as balanced as before, but meaningless."""
    generator = torch.Generator().manual_seed(seed)
    gates = [layer.mlp.gate for layer in model.model.layers]
    originals = [gate.weight.data for gate in gates]
    for gate, weight in zip(gates, originals, strict=True):
        order = torch.randperm(weight.shape[0], generator=generator)
        gate.weight.data = weight[order.to(weight.device)]
    try:
        yield
    finally:
        for gate, weight in zip(gates, originals, strict=True):
            gate.weight.data = weight


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms and biases alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def mixed_precision(model: nn.Module) -> torch.autocast:
    """bfloat16 products on a GPU, float32 on a CPU."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def training_losses(
    model: Qwen2MoeForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy and the load-balancing loss of one batch.

    Transformers pools the layers before it compares experts, which lets one layer's idle expert
    hide behind another's busy one; so its load-balancing loss is taken layer by layer.
    """
    output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    loss = functional.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
    balance = [
        load_balancing_loss_func((logits,), recipe.experts, recipe.top_k)
        for logits in output.router_logits
    ]
    return loss, torch.stack(balance).mean()


def train(
    model: Qwen2MoeForCausalLM,
    sampler: WindowSampler,
    measure: Callable[[], Evaluation],
    recipe: Recipe,
) -> list[dict[str, float]]:
    """Train in place, leave the weights of the best held-out loss, and return the log's lines."""
    optimizer = make_optimizer(model, recipe)
    best: dict[str, torch.Tensor] = {}
    best_loss = math.inf
    log: list[dict[str, float]] = []
    interval = max(1, recipe.steps // 24)
    begin = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_scale(step, recipe)
        with mixed_precision(model):
            loss, balance = training_losses(model, *sampler.draw(), recipe)
        torch.autograd.backward(loss + recipe.balance * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % interval and step + 1 != recipe.steps:
            continue
        with mixed_precision(model):
            held_out = measure()
        line = {
            "step": step + 1,
            "train_loss": loss.item(),
            "held_out_loss": held_out.loss,
            "held_out_perplexity": held_out.perplexity,
            "least_expert_share": held_out.expert_share.min().item(),
            "largest_expert_share": held_out.expert_share.max().item(),
            "seconds": time.monotonic() - begin,
        }
        log.append(line)
        print("  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
        if held_out.loss < best_loss:
            best_loss = held_out.loss
            best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    return log


def print_evaluation(model: Qwen2MoeForCausalLM, tokenizer: Any, text: str) -> Evaluation:
    """Print the held-out figures, the share of the tokens per expert, and the scrambled routing."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    utf8_bytes = len(text.encode())
    result = evaluate(model, ids, utf8_bytes)
    print(
        f"held-out perplexity {result.perplexity:.3f} ({result.tokens} tokens, "
        f"{result.bits_per_byte:.4f} bits per byte, {model.dtype}, {model.device.type})"
    )
    for layer, share in enumerate(result.expert_share.tolist()):
        print(f"layer {layer} expert share, %: " + " ".join(f"{100 * s:.1f}" for s in share))
    scrambled = []
    for seed in range(3):
        with scrambled_routing(model, seed):
            scrambled.append(evaluate(model, ids, utf8_bytes).perplexity)
    print(
        "perplexity with each router's rows permuted, 3 draws: "
        + " ".join(f"{perplexity:.2f}" for perplexity in scrambled)
    )
    return result


def run_training(text: str, output: Path, device: str, recipe: Recipe) -> None:
    """Train on the text's first 95% and write the model, the held-out text and the log."""
    torch.manual_seed(recipe.seed)
    train_text, held_out_text = split_text(text)
    tokenizer = train_tokenizer(train_text, recipe)
    rng = random.Random(recipe.seed)
    play = tokenizer(train_text, verbose=False)["input_ids"]
    chats = [token for _ in range(4) for token in build_chats(train_text, tokenizer, rng)]
    held_out = tokenizer(held_out_text, verbose=False)["input_ids"]
    utf8_bytes = len(held_out_text.encode())
    model = build_model(tokenizer, recipe).to(device)
    if model.device.type == "cuda":
        ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
        model.set_experts_implementation("dense")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {len(play)} training and {len(held_out)} held-out tokens")
    sampler = WindowSampler(play, chats, len(tokenizer), recipe, device)
    begin = time.monotonic()
    with training_dropout(model, recipe.dropout):
        log = train(model, sampler, lambda: evaluate(model, held_out, utf8_bytes), recipe)
    seconds = time.monotonic() - begin

    model = model.to(torch.bfloat16)
    result = print_evaluation(model, tokenizer, held_out_text)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    (output / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    record = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": parameters,
        "held_out_perplexity": result.perplexity,
        "held_out_bits_per_byte": result.bits_per_byte,
        "training_seconds": seconds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "log": log,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"trained in {seconds:.0f} s; wrote {output / 'model'}")


def run_evaluation(model_dir: Path, text: str, device: str, dtype: str) -> None:
    """Print the held-out figures of a saved model."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    print_evaluation(model.to(device), tokenizer, text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the recipe's flags and defaults come from `Recipe`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "text",
        nargs="?",
        type=Path,
        help="plain text of the play; with --evaluate-only the packaged held-out text by default",
    )
    parser.add_argument("--output", type=Path, help="folder for the result (needed to train)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--small", action="store_true", help="a tiny, short run for a CPU")
    parser.add_argument("--evaluate-only", type=Path, metavar="MODEL_DIR", help="do not train")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="precision of --evaluate-only (default float32)",
    )
    recipe = parser.add_argument_group("recipe")
    for option in dataclasses.fields(Recipe):
        recipe.add_argument(
            "--" + option.name.replace("_", "-"),
            type=type(option.default),
            default=option.default,
            metavar="N" if isinstance(option.default, int) else "X",
            help=f"{option.metadata['help']} (default {option.default})",
        )
    parsed = parser.parse_args(arguments)
    if parsed.evaluate_only is None and (parsed.text is None or parsed.output is None):
        parser.error("training needs the path of the text and --output DIR")
    return parsed


def main() -> None:
    """Entry point."""
    arguments = parse_arguments()
    try:
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("--device cuda was asked for, and torch sees no CUDA device here.")
        if arguments.evaluate_only is not None:
            if arguments.text is None:
                text = PACKAGED_HELD_OUT.read_text(encoding="utf-8")
            else:
                text = split_text(arguments.text.read_text(encoding="utf-8"))[1]
            run_evaluation(arguments.evaluate_only, text, arguments.device, arguments.dtype)
            return
        names = [option.name for option in dataclasses.fields(Recipe)]
        recipe = Recipe(**{name: getattr(arguments, name) for name in names})
        run_training(
            arguments.text.read_text(encoding="utf-8"),
            arguments.output,
            arguments.device,
            recipe.small() if arguments.small else recipe,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"train_demo: {error}")


if __name__ == "__main__":
    main()
