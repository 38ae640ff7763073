"""`moetor chat`: a conversation on the terminal."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moetor.cli.console import note, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.loading import load_fused
from moetor.cli.options import check_batch_invariant, check_level, check_one_gpu
from moetor.cli.parallel_options import ParallelModelOptions
from moetor.cli.sampling import check_sampling
from moetor.cli.streaming import stream_text
from moetor.errors import InputError, MoetorError, ParallelError
from moetor.parallel.launch import rank_number

if TYPE_CHECKING:
    from moetor.engine import Engine, SamplingParams
    from moetor.engine.core import EngineCore

HELP = """/help            this list
/reset           forget the conversation, not the system prompt
/system TEXT     another system prompt, and forget the conversation
/undo            forget the last question and its answer
/retry           answer the last question again
/set NAME VALUE  temperature, top_p, top_k, min_p, max_tokens, seed or repetition_penalty
/history         the conversation so far
/quit            leave; so does Ctrl-D"""
_NUMBERS: dict[str, type] = {
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "top_k": int,
    "max_tokens": int,
    "seed": int,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions(ParallelModelOptions):
    """Talk with a model.

    Each line of standard input is a message, or a command that begins with a slash; /help lists
    them. Answers go to standard output as they are produced, figures to standard error. The model
    sees the whole conversation each time; what it has seen before is not computed again. Ctrl-C
    interrupts an answer; over several ranks it ends the conversation.
    """

    system: str | None = field(
        default=None, metadata={"metavar": "TEXT", "help": "the system prompt"}
    )
    max_tokens: int = field(
        default=512, metadata={"metavar": "N", "help": "tokens of an answer, at most"}
    )
    temperature: float = field(
        default=0.7,
        metadata={"metavar": "X", "help": "0 always takes the likeliest token, above 0 samples"},
    )
    top_p: float = field(
        default=0.95,
        metadata={
            "metavar": "P",
            "help": "sample among the likeliest tokens that together have this probability",
        },
    )
    seed: int | None = field(
        default=None, metadata={"metavar": "N", "help": "makes sampling repeatable"}
    )

    @property
    def converses(self) -> bool:
        """Rank 0 reads what its launcher is given."""
        return True

    def __post_init__(self) -> None:
        check_sampling(self.max_tokens, self.temperature, self.top_p, self.seed)
        check_level(self)
        check_one_gpu(self, self.parallel())  # refuses flags that contradict one another
        check_batch_invariant(self.batch_invariant, self, self.parallel())
        if self.json:
            raise UsageError(
                "--json: a conversation is no one object; use `moetor generate --chat`"
            )


class Conversation:
    """What was said, and how answers are sampled.

    Args:
        engine: answers.
        params: of the answers.
        kernels: for the figures.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None,
        kernels: tuple[str, ...],
    ) -> None:
        self.engine, self.params, self.kernels = engine, params, kernels
        self.system = system
        self.messages: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Answers a line or obeys it; False when it says to leave."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._ask(line)
            return True
        word, _, rest = line[1:].strip().partition(" ")
        return self._obey(word, rest.strip())

    def _obey(self, word: str, rest: str) -> bool:
        match word:
            case "quit" | "exit":
                return False
            case "help":
                note(HELP)
            case "reset":
                self.messages.clear()
            case "system":
                self.system = rest or None
                self.messages.clear()
            case "undo":
                self._undo()
            case "retry":
                question = self._undo()
                if question is not None:
                    self._ask(question)
            case "set":
                self._set(*rest.partition(" ")[::2])
            case "history":
                for message in self._all():
                    note(f"{message['role']}: {message['content']}")
            case _:
                note(f"/{word} is no command; /help lists them")
        return True

    def _all(self) -> list[dict[str, str]]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.messages

    def _undo(self) -> str | None:
        if not self.messages:
            note("nothing was said yet")
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def _set(self, name: str, value: str) -> None:
        from dataclasses import replace

        if name not in _NUMBERS:
            note(f"{name or '/set'} is none of {', '.join(_NUMBERS)}")
            return
        try:
            self.params = replace(self.params, **{name: _NUMBERS[name](value)})
        except ValueError as error:  # InputError is one
            note(f"/set {name}: {error}")

    def _ask(self, question: str) -> None:
        from moetor.engine.chat_template import chat_tokens

        said = [*self._all(), {"role": "user", "content": question}]
        try:
            prompt = chat_tokens(self.engine.tokenizer, said)
            found = stream_text(self.engine, prompt, self.params, _write, kernels=self.kernels)
        except InputError as refusal:
            note(f"{refusal}; /reset forgets the conversation")
            return
        except KeyboardInterrupt:
            if self.engine.core.shared:
                raise  # in the middle of a step, in which the other ranks go on
            print()
            note("interrupted; the question is forgotten")
            return
        except ParallelError:
            raise
        except MoetorError as failure:
            note(str(failure))
            return
        print()
        note(str(found.figures))
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": found.output.outputs[0].text},
        ]


def run(options: ChatOptions) -> int:
    """Talk until the input ends, and return the exit status."""
    from moetor.engine import EngineConfig, ModelSource, SamplingParams, build_engine
    from moetor.huggingface import loading

    quiet_transformers()
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    tokenizer: Any = loading.load_tokenizer(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    if tokenizer.chat_template is None:
        raise UsageError(
            f"the tokenizer of {options.model!r} has no chat template; use `moetor generate`"
        )
    model, report = load_fused(options)
    engine = build_engine(
        ModelSource(model=model, tokenizer=tokenizer, level="none"),
        EngineConfig(max_num_seqs=1, batch_invariant=options.batch_invariant),
    )
    if rank_number():
        engine.core.follow()
        return 0
    engine.core.lead()
    kernels = () if report is None else report.kernels
    talk = Conversation(engine, params, options.system, kernels)
    if sys.stdin.isatty():
        note("/help lists the commands, Ctrl-D leaves")
    try:
        while (line := _line(engine.core)) is not None and talk.take(line):
            pass
    except BaseException as error:
        engine.core.close(error)
        raise
    engine.core.close()
    return 0


def _line(core: EngineCore) -> str | None:
    """The next line; None where there is none. Other ranks hear of this one meanwhile.

    Raises:
        ParallelError: another rank has ended.
    """
    came = threading.Event()

    def rest() -> None:
        while not came.wait(core.patience):
            try:
                core.rest()
            except ParallelError:
                return  # the core keeps it

    resting = threading.Thread(target=rest, name="moetor-rest", daemon=True)
    if core.patience is not None:
        resting.start()
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return None
    finally:
        came.set()
        if resting.ident is not None:
            resting.join()
        if core.fatal is not None:
            raise core.fatal


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
