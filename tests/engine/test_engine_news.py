"""What a step changed: a token alone in its short form, all else in the long one."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from moetor.engine.news import Batch, copy_of, new_token, news_of, take_news, take_token
from moetor.engine.outputs import RequestMetrics
from moetor.engine.params import SamplingParams
from moetor.engine.sequence import Request, Sequence
from moetor.engine.wire import packed, unpacked


def request(count: int = 1, **params: Any) -> Request:
    """A request of a prompt of three tokens."""
    made = Request("r", None, [1, 2, 3], SamplingParams(**params), RequestMetrics(0.0))
    for index in range(count):
        made.sequences.append(Sequence(made, index, 0, frozenset(), 9, [1, 2, 3], 3))
    return made


def through_a_socket(batch: Batch) -> Batch:
    return unpacked(pickle.loads(pickle.dumps(packed(batch))))


def test_a_copy_follows_its_original() -> None:
    original = request()
    copy = copy_of(original, None)
    short = 0
    for step in range(1, 6):
        sequence = original.sequences[0]
        sequence.token_ids.append(10 * step)
        if step == 5:
            sequence.finish_reason = "length"
        token = new_token(original)
        tokens, news = ([], [news_of(original)]) if token is None else ([("r", token)], [])
        short += token is not None
        told = through_a_socket(Batch(tokens, news, None, []))
        for name, one in told.tokens:
            assert name == copy.request_id
            take_token(copy, one)
        for all_of_it in told.news:
            take_news(copy, all_of_it)
        assert copy.sequences[0].token_ids == sequence.token_ids
    assert short == 3  # neither the first, which has the request's times, nor the last
    assert copy.finished
    assert new_token(original) is None


@pytest.mark.parametrize(
    ("made", "tokens", "logprobs"),
    [
        (request(2, n=2), [7], None),
        (request(stop=["a"]), [7], None),
        (request(), [7, 8], None),
        (request(), [], None),
        (request(logprobs=1), [7], []),
    ],
    ids=["two sequences", "stop strings", "two tokens", "none", "log-probabilities"],
)
def test_what_is_more_than_a_token(made: Request, tokens: list[int], logprobs: Any) -> None:
    for sequence in made.sequences:
        sequence.token_ids += [6, *tokens]
        sequence.reported, sequence.logprobs = 1, logprobs
    assert new_token(made) is None
    assert [sequence.reported for sequence in made.sequences] == [1] * len(made.sequences)
