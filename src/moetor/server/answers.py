"""What the answers of both completion endpoints share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from moetor.engine import CompletionOutput, RequestOutput
from moetor.server.service import Job, Service, failure


async def collect(service: Service, job: Job) -> list[RequestOutput]:
    """The last output of each prompt.

    Raises:
        ApiError: one of them failed.
    """
    choices = Choices(service, job)
    async for _ in choices.states():
        pass
    return choices.last


class Choices:
    """Follows the outputs of a request.

    Attributes:
        last: output of each prompt, complete when all have finished.
    """

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job = service, job
        self._last: dict[int, RequestOutput] = {}
        self._started: set[tuple[int, int]] = set()
        self._finished: set[tuple[int, int]] = set()

    @property
    def last(self) -> list[RequestOutput]:
        """The newest output of each prompt."""
        return [self._last[number] for number in sorted(self._last)]

    async def states(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Outputs with the number of their prompt.

        Raises:
            ApiError: one of them failed.
        """
        async with aclosing(self._job.outputs()) as outputs:
            async for number, output in outputs:
                self._last[number] = output
                wrong = failure(output)
                if wrong is not None:
                    raise wrong
                yield number, output

    async def news(self) -> AsyncGenerator[tuple[int, RequestOutput, CompletionOutput, bool]]:
        """Number of the prompt, its output, a choice with something new, and whether it is the
        choice's first.
        """
        async with aclosing(self.states()) as states:
            async for number, output in states:
                for one in output.outputs:
                    key = number, one.index
                    if key in self._finished or not (one.new_token_ids or one.finished):
                        continue
                    if one.finished:
                        self._finished.add(key)
                    first = key not in self._started
                    self._started.add(key)
                    yield number, output, one, first


def usage(outputs: Sequence[RequestOutput], *, generated: bool = True) -> dict[str, Any]:
    """Tokens of a request, as OpenAI counts them.

    Args:
        generated: whether generated tokens were part of the answer.
    """
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(len(one.token_ids) for output in outputs for one in output.outputs) * generated
    cached = sum(output.metrics.num_cached_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
