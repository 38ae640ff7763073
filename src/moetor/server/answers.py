"""What the answers of both completion endpoints share."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from moetor.engine import CompletionOutput, RequestOutput
from moetor.engine.client import STOPPED
from moetor.server.errors import ApiError
from moetor.server.protocol import StreamOptions
from moetor.server.service import Job, unavailable
from moetor.server.streams import Chunks


class Answer(ABC):
    """Makes an answer of a job's outputs, whole or event by event.

    Args:
        frame: fields of every event beside its choices.
        kinds: the field `object` of a whole answer and of an event.
        options: of streaming.
    """

    def __init__(
        self, frame: dict[str, Any], kinds: tuple[str, str], options: StreamOptions | None
    ) -> None:
        self._frame = {**frame, "object": kinds[0]}
        self._counted = options is not None and bool(options.include_usage)
        self._chunks = Chunks({**frame, "object": kinds[1]}, counted=self._counted)

    async def whole(self, job: Job) -> dict[str, Any]:
        """The body, once all is generated.

        Raises:
            ApiError: a prompt failed.
        """
        outputs = [checked(await stream.last()) for stream in job.streams]
        return {**self._frame, "choices": self._choices(outputs), "usage": self._usage(job)}

    async def events(self, job: Job) -> AsyncGenerator[bytes]:
        """The same piece by piece; one that is empty has nothing for the client.

        Raises:
            ApiError: a prompt failed.
        """
        begun: set[tuple[int, int]] = set()
        finished: set[tuple[int, int]] = set()
        async with aclosing(job.outputs()) as outputs:
            async for output in outputs:
                number = job.numbers[output.request_id]
                for one in checked(output).outputs:
                    choice = number, one.index
                    if not (one.new_token_ids or one.finished) or choice in finished:
                        continue
                    if one.finished:
                        finished.add(choice)
                    first = choice not in begun
                    begun.add(choice)
                    yield self._event(number, output, one, first)
        if self._counted:
            yield self._chunks.usage(self._usage(job))

    @abstractmethod
    def _choices(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """Those of the whole answer."""

    @abstractmethod
    def _event(
        self, number: int, output: RequestOutput, one: CompletionOutput, first: bool
    ) -> bytes:
        """What is new of one choice, of which `first` says whether there was nothing before.

        Args:
            output: holds only what is new, as `one` does.
        """

    def _usage(self, job: Job) -> dict[str, Any]:
        return usage(job)


def checked(output: RequestOutput) -> RequestOutput:
    """An output of a request that goes well.

    Raises:
        ApiError: it does not.
    """
    if output.error is not None and output.error.startswith(STOPPED):
        raise unavailable(output.error)
    if output.error is not None:
        raise ApiError(500, f"the engine failed on this request: {output.error}")
    if output.finished and any(one.finish_reason == "abort" for one in output.outputs):
        raise unavailable("the request was ended before it was done: the server is stopping")
    return output


def routed_experts(one: CompletionOutput) -> dict[str, str]:
    """The field of a choice that tells which experts its tokens went to, as vLLM encodes it: an
    array in numpy's file format, in base64. Empty where the engine does not keep it.
    """
    if one.routed_experts is None:
        return {}
    file = io.BytesIO()
    np.save(file, one.routed_experts)
    return {"routed_experts": base64.b64encode(file.getvalue()).decode()}


def usage(job: Job, *, generated: bool = True) -> dict[str, Any]:
    """Tokens of a request, as OpenAI counts them.

    Args:
        generated: whether generated tokens were part of the answer.
    """
    requests = [stream.request for stream in job.streams]
    prompt = sum(len(one.prompt_ids) for one in requests)
    made = sum(one.known - one.prompt_len for each in requests for one in each.sequences)
    cached = sum(one.metrics.num_cached_tokens for one in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made * generated,
        "total_tokens": prompt + made * generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
