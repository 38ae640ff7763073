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
        return {**self._frame, "choices": self._choices(outputs), "usage": self._usage(outputs)}

    async def events(self, job: Job) -> AsyncGenerator[bytes]:
        """The same piece by piece; one that is empty has nothing for the client.

        Raises:
            ApiError: a prompt failed.
        """
        last: dict[int, RequestOutput] = {}
        finished: set[tuple[int, int]] = set()
        async with aclosing(job.outputs()) as outputs:
            async for number, output in outputs:
                last[number] = checked(output)
                for one in output.outputs:
                    if not one.new_token_ids and not one.finished:
                        continue
                    if one.finished:
                        if (number, one.index) in finished:
                            continue
                        finished.add((number, one.index))
                    first = len(one.new_token_ids) == len(one.token_ids)
                    yield self._event(number, output, one, first)
        if self._counted:
            yield self._chunks.usage(self._usage([last[number] for number in sorted(last)]))

    @abstractmethod
    def _choices(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """Those of the whole answer."""

    @abstractmethod
    def _event(
        self, number: int, output: RequestOutput, one: CompletionOutput, first: bool
    ) -> bytes:
        """What is new of one choice, of which `first` says whether there was nothing before."""

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return usage(outputs)


def checked(output: RequestOutput) -> RequestOutput:
    """An output of a request that goes well.

    Raises:
        ApiError: it does not.
    """
    if output.error is not None and output.error.startswith(STOPPED):
        raise unavailable(output.error)
    if output.error is not None:
        raise ApiError(500, f"the engine failed on this request: {output.error}")
    if any(one.finish_reason == "abort" for one in output.outputs):
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
