"""Grammars of texts that must have a form: compiled and followed by llguidance."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from moetor.engine.structural_tag import lark
from moetor.engine.structured import WHITE_SPACE, StructuredOutputsParams
from moetor.errors import ConfigError, InputError, MoetorError

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_KEPT = 64


class GrammarError(MoetorError, RuntimeError):
    """A text left its grammar, or the grammar became too large while it was followed."""


class Grammar:
    """How far one sequence's text has come in its grammar.

    Args:
        matcher: at its beginning; nobody else uses it.
        compiler: that made it.
    """

    def __init__(self, matcher: LLMatcher, compiler: GrammarCompiler) -> None:
        self.matcher, self.compiler = matcher, compiler

    def accept(self, token: int) -> None:
        """Takes in the sequence's next token.

        Raises:
            GrammarError: the grammar does not allow it.
        """
        if not self.matcher.consume_token(token):
            raise GrammarError(
                f"the text cannot follow its grammar: {_first_line(self.matcher.get_error())}"
            )

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but an end may follow."""
        return self.matcher.is_stopped()


class GrammarCompiler:
    """Makes grammars for one tokenizer; safe to call from several threads, and to send to another
    process, which then compiles for itself.

    Args:
        tokenizer: of Transformers, or None.
        vocab_size: of the model, whose logits may be more than the tokenizer's tokens.
        ends: the model's end tokens.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: frozenset[int]) -> None:
        self.ends = ends
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._made: OrderedDict[str, LLMatcher] = OrderedDict()
        # A compilation may take long, and nobody waits for another one's.
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._executor: LLExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GrammarCompiler, (self._tokenizer, self._vocab_size, self.ends)

    def start(self, asked: StructuredOutputsParams) -> Grammar:
        """A grammar at its beginning.

        Raises:
            ConfigError: llguidance is not installed, or does not know this kind of tokenizer.
            InputError: the grammar does not compile.
        """
        return Grammar(self.compile(asked).deep_copy(), self)

    def compile(self, asked: StructuredOutputsParams) -> LLMatcher:
        """The compiled grammar; one that was asked for lately is kept. Raises as `start` does."""
        source = self._source(asked)
        with self._lock:
            found = self._made.get(source)
            if found is not None:
                self._made.move_to_end(source)
                return found
        made = self._compile(source)
        with self._lock:
            self._made[source] = made
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return made

    def _compile(self, source: str) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokens(), source, log_level=0)
        if matcher.is_error():
            reason = _first_line(matcher.get_error())
            raise InputError(f"structured_outputs: the grammar does not compile: {reason}")
        return matcher

    def tokens(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it; made at the first call, which takes a second for a
        large vocabulary.

        Raises:
            ConfigError: there is none, or none that llguidance reads.
        """
        if self._tokens is not None:
            return self._tokens
        if self._tokenizer is None:
            raise ConfigError("structured_outputs need a tokenizer, and the engine has none")
        _check_installed()
        from llguidance import hf

        size = max(self._vocab_size, len(self._tokenizer))
        ends = sorted(self.ends) or None
        try:
            self._tokens = hf.from_tokenizer(self._tokenizer, n_vocab=size, eos_token=ends)
        except ValueError as error:
            raise ConfigError(
                f"structured_outputs need a tokenizer that llguidance reads; that of this model, "
                f"a {type(self._tokenizer).__name__}, is none: {_first_line(str(error))}"
            ) from error
        return self._tokens

    def mark(self, text: str) -> str:
        """What `text` is called in Lark's syntax: a token, where the tokenizer has one of this name
        that stands apart from text; else the text. Raises as `tokens` does.
        """
        tokens = self.tokens()
        token = self._tokenizer.get_vocab().get(text)
        if token is not None and tokens.is_special_token(token):
            return text
        return json.dumps(text)

    def _source(self, asked: StructuredOutputsParams) -> str:
        if asked.structural_tag is None:
            return _source(asked)
        return lark(asked.tags(), self._pieces, asked.document)

    def _pieces(self, text: str) -> list[str]:
        """A text in Lark's syntax: the tokens in it that stand apart from text, and the rest."""
        tokens = self.tokens()
        added = self._tokenizer.get_added_vocab()
        apart = sorted(
            (name for name in added if tokens.is_special_token(added[name])), key=len, reverse=True
        )
        found = re.split(f"({'|'.join(map(re.escape, apart))})", text) if apart else [text]
        return [self.mark(piece) for piece in found if piece]

    def executor(self) -> LLExecutor:
        """Threads that compute the masks of several rows."""
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        return self._executor


def _check_installed() -> None:
    try:
        import llguidance  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ConfigError(
            "structured_outputs need llguidance, which is not installed; pip install "
            "'moetor[structured]'"
        ) from missing


def _source(asked: StructuredOutputsParams) -> str:
    """The grammar as llguidance reads it.

    Raises:
        ConfigError: llguidance is not installed.
        InputError: it cannot be read.
    """
    _check_installed()
    from llguidance import LLMatcher, grammar_from

    try:
        if asked.regex is not None:
            return LLMatcher.grammar_from_regex(asked.regex)
        if asked.choice is not None:
            return grammar_from("choice", json.dumps(list(asked.choice)))
        if asked.grammar is not None:
            return grammar_from("grammar", asked.grammar)
        pattern = asked.whitespace_pattern
        if pattern is None and not asked.disable_any_whitespace:
            pattern = WHITE_SPACE
        return LLMatcher.grammar_from_json_schema(
            json.dumps(asked.schema()),
            overrides={
                "whitespace_flexible": not asked.disable_any_whitespace,
                "whitespace_pattern": pattern,
            },
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, MoetorError):
            raise
        raise InputError(
            f"structured_outputs: the grammar cannot be read: {_first_line(str(error))}"
        ) from error


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines[0] if lines else ""
