"""The model that ships in the package: complete, loadable, and really trained."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetor.demo import heldout_text, model_path

PREFIX_TOKENS = 2048
# Measured 16.02 in float32 (on Transformers 5.17 and 5.23); bfloat16 and another order of
# summation move it by far less than 1%, and scrambling the routing raises it to 158.
PREFIX_PERPLEXITY_BOUND = 16.2


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def scored_prefix(model, tokenizer):
    """The logits, the targets and the router logits of the held-out text's first tokens."""
    ids = torch.tensor(tokenizer(heldout_text(), verbose=False)["input_ids"][: PREFIX_TOKENS + 1])
    inputs = ids[:-1].view(-1, model.config.max_position_embeddings)
    with torch.no_grad():
        output = model(inputs, use_cache=False, output_router_logits=True)
    return output.logits.flatten(0, 1), ids[1:], output.router_logits


def test_files_are_present_and_small():
    names = {path.name for path in model_path().iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in model_path().iterdir()) < 12_000_000
    assert 50_000 < len(heldout_text()) < 60_000


def test_config_is_a_qwen2_moe_with_a_shared_expert_and_no_local_path():
    text = (model_path() / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["model_type"] == "qwen2_moe"
    assert config["num_experts"] == 16
    assert config["num_experts_per_tok"] == 4
    assert config["shared_expert_intermediate_size"] == 128
    assert config["tie_word_embeddings"] is True
    assert "/" not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\n",
        "  two  spaces , and 'tis odd !",
        "tab\t\r\nCRLF\x00\x7f",
        "naïve café — «quotes»",
        "日本語 \U0001f642\u200d\U0001f643 e\u0301",
        "<|user|>ROMEO:\nhi<|endoftext|>",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_and_model_agree_on_the_special_tokens(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.do_sample is False


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who's there?"},
        {"role": "assistant", "content": "A friend."},
        {"role": "user", "content": "Stand!"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    end = tokenizer.eos_token
    assert text == (
        f"<|system|>Be brief.{end}<|user|>Who's there?{end}"
        f"<|assistant|>A friend.{end}<|user|>Stand!{end}<|assistant|>"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert ids.count(tokenizer.eos_token_id) == len(messages)


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "42"}], tokenize=False)


def test_every_weight_has_its_key():
    _, info = AutoModelForCausalLM.from_pretrained(model_path(), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_held_out_perplexity(scored_prefix):
    logits, targets, _ = scored_prefix
    perplexity = math.exp(functional.cross_entropy(logits, targets).item())
    assert perplexity < PREFIX_PERPLEXITY_BOUND


def test_every_expert_is_used(scored_prefix, model):
    config = model.config
    router_logits = scored_prefix[2]
    assert len(router_logits) == config.num_hidden_layers
    for layer, logits in enumerate(router_logits):
        chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=config.num_experts) / chosen.numel()
        # Even is 6.25%; measured on this prefix: 3.6% to 12.0%.
        assert share.min() > 0.02, f"layer {layer}: {share.tolist()}"
        assert share.max() < 0.20, f"layer {layer}: {share.tolist()}"


def test_a_chat_reply_ends_by_itself(model, tokenizer):
    messages = [{"role": "user", "content": "Where is the king?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.eos_token_id
    assert ":\n" in tokenizer.decode(output)
