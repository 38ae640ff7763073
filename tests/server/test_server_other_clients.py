"""litellm and lm_eval against a real server; installed by the extra `clients`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cli.test_command_eval import QUESTIONS, write_tasks
from moetor.demo import model_path
from server.server_process import KEY, ServerProcess

TOLERANCE = 1e-3


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(
        "LITELLM_LOCAL_MODEL_COST_MAP", "True"
    )  # else it asks the network for prices
    return pytest.importorskip("litellm", reason="litellm is not installed")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of its own classes
def test_litellm(litellm: Any, server: ServerProcess, own: Any) -> None:
    from moetor import SamplingParams

    messages = [{"role": "user", "content": "Who is there?"}]
    asked: dict[str, Any] = {
        "model": "openai/demo",
        "api_base": f"{server.url}/v1",
        "api_key": KEY,
        "messages": messages,
        "temperature": 0,
        "num_retries": 0,
    }
    params = SamplingParams(temperature=0, max_tokens=8)
    text = own.chat(messages, params, progress=False)[0].outputs[0].text
    whole = litellm.completion(**asked, max_tokens=8)
    assert whole.choices[0].message.content == text
    assert whole.usage.completion_tokens == 8
    stream = litellm.completion(**asked, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text

    async def later() -> str:
        made = await litellm.acompletion(**asked, max_tokens=8)
        return str(made.choices[0].message.content)

    assert asyncio.run(later()) == text
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "aye"}}}
    made = litellm.completion(**asked, response_format=form)
    assert made.choices[0].message.content == '"aye"'
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion(**asked, max_tokens=9999)
    with pytest.raises(litellm.exceptions.AuthenticationError):
        litellm.completion(**{**asked, "api_key": "wrong"}, max_tokens=8)
    with pytest.raises(litellm.exceptions.BadRequestError):
        litellm.completion(**asked, max_tokens=8, top_p=2.0)


def likelihoods(model: Any, folder: Path) -> list[float]:
    """What lm_eval finds for every choice of every question, and for every text."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_choice", "local_text"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    found = []
    for name in ("local_choice", "local_text"):
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        for sample in samples:
            for response in sample["filtered_resps"]:
                found.append(float(response[0] if isinstance(response, tuple) else response))
    return found


def test_lm_eval_finds_what_it_finds_on_the_model_itself(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    pytest.importorskip("tenacity", reason="lm_eval is installed without its API clients")
    import datasets
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_tasks(tmp_path)
    path = str(model_path())
    served = LocalCompletionsAPI(
        model="demo",
        base_url=f"{server.url}/v1/completions",
        tokenizer=path,
        tokenized_requests=True,
        num_concurrent=2,
        max_length=256,
    )
    plain = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(path),
        max_length=256,
    )
    through, theirs = (likelihoods(model, tmp_path) for model in (served, plain))
    assert len(through) == len(theirs) > sum(len(choices) for _, choices, _ in QUESTIONS)
    assert through == pytest.approx(theirs, abs=TOLERANCE)
    assert len(set(theirs)) == len(theirs)  # none of them is a default
