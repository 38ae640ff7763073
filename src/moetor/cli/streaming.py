"""Generated text as it is produced, and the figures of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetor.errors import MoetorError

if TYPE_CHECKING:
    from moetor.engine import Engine, RequestOutput, SamplingParams
    from moetor.engine.intake import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run took.

    Attributes:
        seconds_to_first_token: from the request; the prompt's rate is over this time.
        generated_tokens_per_second: of the tokens after the first, None where there are none.
        kernels: that run the experts; empty where Transformers runs them.
    """

    prompt_tokens: int
    generated_tokens: int
    seconds_to_first_token: float
    prompt_tokens_per_second: float
    generated_tokens_per_second: float | None
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        rate = self.generated_tokens_per_second
        parts = (
            f"prompt {_tokens(self.prompt_tokens)} at {self.prompt_tokens_per_second:.0f} tok/s",
            f"generated {_tokens(self.generated_tokens)}"
            + ("" if rate is None else f" at {rate:.1f} tok/s"),
            f"first token after {self.seconds_to_first_token * 1e3:.0f} ms",
            f"kernels {', '.join(self.kernels) or 'none of ours'}",
        )
        return " | ".join(parts)


@dataclass(frozen=True, slots=True)
class Streamed:
    """A finished text and what it took."""

    output: RequestOutput
    figures: Figures


def stream_text(
    engine: Engine,
    prompt: Prompt,
    params: SamplingParams,
    emit: Callable[[str], None],
    *,
    kernels: tuple[str, ...],
    clock: Callable[[], float] = time.perf_counter,
) -> Streamed:
    """Generates one text and hands it out piece by piece.

    Args:
        engine: nothing else runs in it.
        emit: called with each new piece of text.
        kernels: for the figures.
        clock: seconds.

    Raises:
        InputError: the prompt is refused.
        MoetorError: the model failed.
    """
    core = engine.core
    started = clock()
    request = engine.intake.request(prompt, params, "stream")
    core.add(request)
    first = last = started
    seen = 0
    try:
        while True:
            core.step()
            output = core.output(request)
            (made,) = output.outputs
            if len(made.token_ids) > seen:
                last = clock()
                first = last if seen == 0 else first
                seen = len(made.token_ids)
            if made.new_text:
                emit(made.new_text)
            if output.finished:
                break
    except BaseException:
        core.abort(request.request_id)
        raise
    if output.error is not None:
        raise MoetorError(f"the text could not be generated: {output.error}")
    wait, span, later = max(first - started, 1e-9), last - first, seen - 1
    figures = Figures(
        prompt_tokens=len(request.prompt_ids),
        generated_tokens=seen,
        seconds_to_first_token=wait,
        prompt_tokens_per_second=len(request.prompt_ids) / wait,
        generated_tokens_per_second=later / span if later > 0 and span > 0 else None,
        kernels=kernels,
    )
    return Streamed(output, figures)


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"
