"""`moetor generate`: text from a fused model, as it is produced."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from moetor.cli.console import note, print_json, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.loading import load_fused
from moetor.cli.options import check_batch_invariant, check_level, check_one_gpu
from moetor.cli.parallel_options import ParallelModelOptions
from moetor.cli.sampling import check_sampling
from moetor.cli.streaming import stream_text
from moetor.errors import ConfigError, InputError
from moetor.parallel.launch import rank_number


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(ParallelModelOptions):
    """Continue a prompt.

    The text goes to standard output as it is produced; a closing line of figures to standard
    error. Sampling is what the flags say and nothing else: of the model's generation_config.json
    only the tokens that end a text are used.
    """

    prompt: str = field(
        metadata={
            "metavar": "TEXT",
            "help": "text to continue; - reads it from standard input, without its last newline",
        }
    )
    chat: bool = field(
        default=False,
        metadata={"help": "put the prompt into the tokenizer's chat template, as a user's message"},
    )
    max_tokens: int = field(
        default=64, metadata={"metavar": "N", "help": "tokens to generate at most"}
    )
    temperature: float = field(
        default=0.0,
        metadata={"metavar": "X", "help": "0 always takes the likeliest token, above 0 samples"},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "metavar": "P",
            "help": "sample among the likeliest tokens that together have this probability",
        },
    )
    seed: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "makes sampling repeatable"},
    )

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("--prompt is empty; give at least one character")
        check_sampling(self.max_tokens, self.temperature, self.top_p, self.seed)
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError("--top-p chooses among samples; it needs --temperature above 0")
        check_level(self)
        check_one_gpu(self, self.parallel())  # refuses flags that contradict one another
        check_batch_invariant(self.batch_invariant, self, self.parallel())


def run(options: GenerateOptions) -> int:
    """Generate, print, and return the exit status."""
    prompt = _prompt(options)
    from moetor.engine import EngineConfig, ModelSource, SamplingParams, build_engine
    from moetor.huggingface import loading

    quiet_transformers()
    model_name, revision, trusted = options.model, options.revision, options.trust_remote_code
    config = loading.load_config(model_name, revision=revision, trust_remote_code=trusted)
    tokenizer = loading.load_tokenizer(model_name, revision=revision, trust_remote_code=trusted)
    ids = _tokens(options, tokenizer, prompt)
    _check_length(options, len(ids), loading.context_length(config))
    model, report = load_fused(options)
    kernels = () if report is None else report.kernels
    engine = build_engine(
        ModelSource(model=model, tokenizer=tokenizer, level="none"),
        EngineConfig(
            max_num_seqs=1,
            max_model_len=len(ids) + options.max_tokens,
            enable_prefix_caching=False,
            batch_invariant=options.batch_invariant,
        ),
    )
    streamed = stream_text(
        engine,
        ids,
        SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        ),
        _discard if options.json or rank_number() else _write,
        kernels=kernels,
    )
    (made,) = streamed.output.outputs
    if rank_number():
        return 0  # rank 0 speaks for all
    if options.json:
        print_json(
            {
                "model": model_name,
                "prompt": prompt,
                "text": made.text,
                "prompt_token_ids": streamed.output.prompt_token_ids,
                "token_ids": made.token_ids,
                "finish_reason": made.finish_reason,
                "figures": asdict(streamed.figures),
                "fusion": None if report is None else report.to_dict(),
            }
        )
    else:
        print()
        note(str(streamed.figures))
    return 0


def _prompt(options: GenerateOptions) -> str:
    """The prompt's text, read from standard input where `-` says so."""
    prompt = options.prompt
    try:
        if prompt == "-":
            if sys.stdin.isatty():
                note("reading the prompt from standard input, up to Ctrl-D")
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        prompt.encode("utf-8")
    except UnicodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text: {error}") from error
    if not prompt:
        raise UsageError("the prompt on standard input is empty; give at least one character")
    return prompt


def _tokens(options: GenerateOptions, tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's token ids."""
    from moetor.engine.chat_template import chat_tokens

    if not options.chat:
        ids = list(tokenizer(prompt)["input_ids"])
    elif tokenizer.chat_template is None:
        raise UsageError(
            f"--chat: the tokenizer of {options.model!r} has no chat template; leave out --chat"
        )
    else:
        try:
            ids = chat_tokens(tokenizer, [{"role": "user", "content": prompt}])
        except InputError as error:
            raise UsageError(f"--chat: {error}") from error
    if not ids:
        raise UsageError("the prompt has no tokens; give at least one word")
    return ids


def _check_length(options: GenerateOptions, tokens: int, context: int | None) -> None:
    if context is None or tokens + options.max_tokens <= context:
        return
    if tokens < context:
        advice = f"shorten the prompt, or take --max-tokens {context - tokens} or less"
    else:
        advice = "shorten the prompt"
    raise UsageError(
        f"the prompt has {tokens} tokens and --max-tokens is {options.max_tokens}, together more "
        f"than the {context} that {options.model!r} can attend to; {advice}"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(_text: str) -> None:
    pass
