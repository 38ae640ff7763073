"""Texts that must have a form: every token against what a plain model and a plain rule allow."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.engine_cases import assert_empty, run_staggered
from engine.test_engine_graphs import rerun
from moetor import LLM, SamplingParams, StructuredOutputsParams
from moetor.demo import model_path
from moetor.engine import EngineConfig, ModelSource, build_engine, graphs
from moetor.engine.build import Engine
from moetor.errors import ConfigError, InputError

STRING = re.compile(r'"(\\.|[^"\\])*"')
PROMPTS = ("ROMEO:", "To be, or not to be", "First Citizen:\nBefore we proceed")
PERSON = {
    "type": "object",
    "title": "Person",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "house": {"enum": ["Montague", "Capulet"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "foes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "house", "age", "foes"],
    "additionalProperties": False,
}


def engine(**settings: Any) -> Engine:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_blocks": 64}
    source = ModelSource(model="demo", dtype="float32", device="cpu")
    return build_engine(source, EngineConfig(**{**defaults, **settings}))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32", device="cpu", kv_cache_blocks=128, max_num_seqs=16)


def asks(form: StructuredOutputsParams | None, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 64, "structured_outputs": form, **more})


def texts(llm: LLM, form: StructuredOutputsParams, **more: Any) -> list[str]:
    params = [asks(form, temperature=0, **more), asks(form, seed=3, **more)]
    params.append(asks(form, n=2, seed=7, temperature=1.5, top_p=0.9, **more))
    outputs = llm.generate([PROMPTS[0]] * len(params), params, progress=False)
    assert all(output.error is None for output in outputs)
    made = [one for output in outputs for one in output.outputs]
    assert {one.finish_reason for one in made} == {"stop"}
    return [one.text for one in made]


def is_person(text: str) -> bool:
    read = json.loads(text)
    return (
        list(read) == list(PERSON["properties"])
        and len(read["name"]) <= 9
        and read["house"] in ("Montague", "Capulet")
        and type(read["age"]) is int
        and 0 <= read["age"] <= 99
        and len(read["foes"]) <= 2
        and all(type(foe) is bool for foe in read["foes"])
    )


FORMS: dict[str, tuple[StructuredOutputsParams, Callable[[str], object]]] = {
    "schema": (StructuredOutputsParams(json=PERSON), is_person),
    "schema_as_text": (
        StructuredOutputsParams(json='{"enum": [null, 1.5, "a b"]}'),
        lambda text: json.loads(text) in (None, 1.5, "a b"),
    ),
    "no_white_space": (
        StructuredOutputsParams(json=PERSON, disable_any_whitespace=True),
        lambda text: is_person(text) and not re.search(r"\s", STRING.sub("", text)),
    ),
    "own_white_space": (
        StructuredOutputsParams(
            json={"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2},
            whitespace_pattern="_",
        ),
        lambda text: re.fullmatch(r"\[_?1_?,_?1_?\]", text),
    ),
    "closed_object": (
        StructuredOutputsParams(
            json={"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
            disable_additional_properties=True,
        ),
        lambda text: json.loads(text) == {"a": 1},
    ),
    "regex": (
        StructuredOutputsParams(regex=r"[A-F]{2}é[0-9]{1,3}(yes|no)"),
        lambda text: re.fullmatch(r"[A-F]{2}é[0-9]{1,3}(yes|no)", text),
    ),
    "choice": (
        StructuredOutputsParams(choice=["yes", "yes, please", "no", 'quo"te\\']),
        lambda text: text in ("yes", "yes, please", "no", 'quo"te\\'),
    ),
    "lark": (
        StructuredOutputsParams(grammar='start: "(" start ")" | /[0-9]/ '),
        lambda text: re.fullmatch(r"\(*[0-9]\)*", text) and text.count("(") == text.count(")"),
    ),
    "gbnf": (
        StructuredOutputsParams(grammar='root ::= "x" [0-9] [0-9]? "y"'),
        lambda text: re.fullmatch(r"x[0-9]{1,2}y", text),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_texts_have_the_form(llm: LLM, name: str) -> None:
    form, fits = FORMS[name]
    made = texts(llm, form, max_tokens=400)
    assert all(fits(text) for text in made), made


def test_a_json_object_is_one_as_far_as_it_goes(llm: LLM) -> None:
    form = StructuredOutputsParams(json_object=True)
    (output,) = llm.generate(PROMPTS[0], asks(form, seed=2), progress=False)
    one = output.outputs[0]
    assert one.text.startswith("{")
    if one.finish_reason == "stop":
        assert isinstance(json.loads(one.text), dict)


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(model_path())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def likeliest(plain: tuple[Any, Any], prompt: str, begins: str, fits: str) -> list[int]:
    """Greedy tokens, by the model itself, among those that keep the text the beginning of one that
    fits; what a text may begin with and what it may be are both told as patterns.
    """
    model, tokenizer = plain
    ids = tokenizer(prompt)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    text, made = "", []
    while True:
        can = [
            token
            for token, piece in enumerate(pieces)
            if token not in special and re.fullmatch(begins, text + piece)
        ]
        ends = [tokenizer.eos_token_id] if re.fullmatch(fits, text) else []
        if not can:
            return made
        with torch.no_grad():
            logits = model(torch.tensor([ids + made])).logits[0, -1]
        best = max(can + ends, key=lambda token: float(logits[token]))
        made.append(best)
        if best in ends:
            return made
        text += pieces[best]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("letters", ["[a-f]", "[a-zA-Z ,.]", "[^e]"])
def test_each_token_is_the_likeliest_that_is_allowed(
    llm: LLM, plain: tuple[Any, Any], prompt: str, letters: str
) -> None:
    form = StructuredOutputsParams(regex=letters + "{5,20}")
    (output,) = llm.generate(prompt, asks(form, temperature=0), progress=False)
    wanted = likeliest(plain, prompt, letters + "{1,20}", letters + "{5,20}")
    assert output.outputs[0].token_ids == wanted


def mixed(count: int) -> tuple[list[str], list[SamplingParams]]:
    """Requests with and without a form, greedy and drawn."""
    forms = [form for form, _ in FORMS.values()]
    params = []
    for number in range(count):
        form = forms[number % len(forms)] if number % 3 else None
        how: dict[str, Any] = {"temperature": 0} if number % 2 else {"seed": number, "top_k": 40}
        params.append(asks(form, max_tokens=16, **how, ignore_eos=form is None))
    return [PROMPTS[number % 3] * (1 + number % 4) for number in range(count)], params


@pytest.mark.parametrize(
    ("settings", "overlap"),
    [
        ({"max_num_batched_tokens": 8}, True),
        ({"kv_cache_blocks": 7, "max_model_len": 96}, False),  # sequences are preempted
        ({"kv_cache_blocks": 7, "max_model_len": 96}, True),
        ({"enable_prefix_caching": False, "max_num_seqs": 3}, True),
    ],
)
def test_tokens_depend_on_nothing_else_in_the_batch(
    settings: dict[str, Any], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = mixed(9)
    alone = engine()
    wanted = [
        run_staggered(alone, [prompt], [one])["0"].outputs[0].token_ids
        for prompt, one in zip(prompts, params, strict=True)
    ]
    monkeypatch.setattr(graphs, "record", rerun)
    together = engine(**settings)
    if overlap:
        together.core.runner.graphs.capture()
        together.core._overlap = True
    done = run_staggered(together, prompts, params, every=1)
    assert [done[str(number)].outputs[0].token_ids for number in range(9)] == wanted
    assert (together.core.stats().graph_steps > 0) is overlap
    assert ("kv_cache_blocks" in settings) is (together.core.stats().preemptions > 0)
    assert_empty(together)


def test_step_after_step_is_launched_with_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under overlap a row with a grammar has a part in every step, as any other has."""
    one = engine()
    one.core._overlap = True
    form = StructuredOutputsParams(regex="[0-9]{20}")
    one.core.add(one.intake.request(PROMPTS[0], asks(form, temperature=0), "a"))
    one.core.add(one.intake.request(PROMPTS[0], asks(None, max_tokens=20, ignore_eos=True), "b"))
    steps = 0
    while not one.core.idle:
        one.core.step()
        steps += 1
    assert steps <= 22


def test_the_model_s_own_logprobs_are_told(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["Zounds"])
    params = asks(form, temperature=0, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate(PROMPTS[0], params, progress=False)
    one = output.outputs[0]
    assert one.text == "Zounds"
    assert one.logprobs is not None
    # the first letter was not the likeliest of the model
    assert one.logprobs[0][one.token_ids[0]].rank > 2
    pairs = zip(one.token_ids, one.logprobs, strict=True)
    total = sum(entry[token].logprob for token, entry in pairs)
    assert one.cumulative_logprob == pytest.approx(total)


def test_ends_come_only_where_the_text_is_complete(llm: LLM) -> None:
    end = llm.tokenizer.eos_token_id
    always = {end: 100.0}
    form = StructuredOutputsParams(regex="[ab]{3,9}")
    (output,) = llm.generate(PROMPTS[0], asks(form, logit_bias=always), progress=False)
    assert re.fullmatch("[ab]{3}", output.outputs[0].text)
    assert output.outputs[0].token_ids[-1] == end
    (output,) = llm.generate(
        PROMPTS[0], asks(form, logit_bias=always, min_tokens=7), progress=False
    )
    assert len(output.outputs[0].token_ids) > 7
    assert re.fullmatch("[ab]{3,9}", output.outputs[0].text)


@pytest.mark.parametrize("more", [{"min_tokens": 40}, {"ignore_eos": True}])
def test_a_complete_text_ends_whatever_is_asked(llm: LLM, more: dict[str, Any]) -> None:
    form = StructuredOutputsParams(choice=["yes", "yes, please"])
    made = texts(llm, form, **more)
    assert set(made) == {"yes, please"}  # not before nothing can follow


def test_stop_strings_and_lengths_cut_it(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="[0-9]{8}x[0-9]{8}")
    params = [asks(form, stop="x", temperature=0), asks(form, max_tokens=3, temperature=0)]
    stopped, cut = llm.generate([PROMPTS[0]] * 2, params, progress=False)
    assert re.fullmatch("[0-9]{8}", stopped.outputs[0].text)
    assert stopped.outputs[0].stop_reason == "x"
    assert cut.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 5e-324},
        {"temperature": 1e300},
        {"repetition_penalty": 1e-6, "presence_penalty": -2},
        {"repetition_penalty": 1e6, "top_p": 1e-9},
    ],
)
def test_extremes_stay_within_the_form(llm: LLM, more: dict[str, Any]) -> None:
    form = StructuredOutputsParams(regex="[a-z ]{9}")
    params = [asks(form, seed=seed, **more) for seed in range(4)]
    for output in llm.generate([PROMPTS[0]] * 4, params, progress=False):
        assert output.error is None
        assert re.fullmatch("[a-z ]{9}", output.outputs[0].text)


def test_one_request_in_a_dead_end_fails_alone(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["yes", "no"])
    # All but the special token 0, which no form allows.
    everything = dict.fromkeys(range(1, 1024), -float("inf"))
    params = [asks(form, temperature=0, logit_bias=everything), asks(form, temperature=0)]
    dead, alive = llm.generate([PROMPTS[0]] * 2, params, progress=False)
    assert dead.outputs[0].finish_reason == "error"
    assert "cannot follow its grammar" in str(dead.error)
    assert alive.outputs[0].text in ("yes", "no")
    assert_empty(llm.engine)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "no form"),
    ({"json_object": False}, "no form"),
    ({"json": {}, "regex": "a"}, "json and regex"),
    ({"json": "[]"}, "list"),
    ({"json": "{"}, "no JSON schema|not a JSON schema"),
    ({"json": {1: {2}}}, "not a JSON schema"),
    ({"regex": 5}, "text"),
    ({"choice": []}, "list of texts"),
    ({"choice": "yes"}, "list of texts"),
    ({"choice": ["a", ""]}, "list of texts"),
    ({"regex": "a", "disable_any_whitespace": True}, "json"),
    ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "give one"),
    ({"json_object": True, "disable_additional_properties": True}, "schemas"),
]


@pytest.mark.parametrize(("fields", "told"), WRONG)
def test_contradictions_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        StructuredOutputsParams(**fields)


NOT_COMPILED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "nothing"}}, "nothing"),
    ({"json": {"not": {"type": "string"}}}, "not"),
    ({"json": {"$ref": "#/$defs/none"}}, "none"),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum"),
    ({"regex": "("}, "unclosed|regex"),
    ({"regex": "(?=a)b"}, "regex"),
    ({"grammar": "nothing at all"}, "cannot be read"),
    ({"grammar": "start: other"}, "other"),
    ({"json_object": True, "whitespace_pattern": "("}, "compile"),
]


@pytest.mark.parametrize(("fields", "told"), NOT_COMPILED)
def test_what_does_not_compile_is_refused(llm: LLM, fields: dict[str, Any], told: str) -> None:
    form = StructuredOutputsParams(**fields)
    bad, good = llm.generate([PROMPTS[0]] * 2, [asks(form), asks(None)], progress=False)
    assert bad.error is not None
    assert re.search(told, bad.error)
    assert bad.error.startswith("structured_outputs")
    assert good.error is None
    assert_empty(llm.engine)


def test_what_is_missing_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    form = StructuredOutputsParams(regex="a")
    monkeypatch.setattr(llm.engine.intake.grammars, "_tokenizer", None)
    monkeypatch.setattr(llm.engine.intake.grammars, "_tokens", None)
    with pytest.raises(ConfigError, match="tokenizer"):
        llm.generate(list(PROMPTS), [asks(None), asks(None), asks(form)], progress=False)
    assert_empty(llm.engine)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"moetor\[structured\]"):
        llm.generate(PROMPTS[0], asks(form), progress=False)


def test_a_compiler_travels_to_another_process(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="ab")
    sent = pickle.loads(pickle.dumps(llm.engine.intake.grammars))
    grammar = sent.start(form)
    for token in llm.tokenizer("ab", add_special_tokens=False)["input_ids"]:
        assert not grammar.finished
        grammar.accept(token)
    assert grammar.finished
