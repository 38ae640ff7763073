"""`moetor generate`: text from a fused model, as it is produced."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moetor.cli.console import note, print_json, progress, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.options import MODEL, QUANTIZATION, ModelOptions, QuantizationName
from moetor.cli.streaming import TextStream
from moetor.errors import ConfigError

if TYPE_CHECKING:
    from moetor.huggingface import FusionReport


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(ModelOptions):
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
    level: Literal["auto", "block", "experts", "none"] = field(
        default="auto",
        metadata={
            "group": MODEL,
            "help": "fuse whole MoE blocks, their experts alone, or nothing (plain Transformers); "
            "auto takes the deepest that each block allows",
        },
    )
    quantization: QuantizationName | None = field(default=None, metadata=QUANTIZATION)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("--prompt is empty; give at least one character")
        if self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature:g} must be 0 or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p:g} must be above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError("--top-p chooses among samples; it needs --temperature above 0")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ConfigError(f"--seed {self.seed} must be at least 0 and below 2^64")
        if self.level == "none" and self.kernel != "auto":
            raise ConfigError(
                f"--level none runs plain Transformers, which has no kernel {self.kernel!r}; "
                "leave out one of the two"
            )
        if self.level == "none" and self.quantization is not None:
            raise ConfigError(
                "--level none runs plain Transformers, which does not quantise experts; leave out "
                "one of the two"
            )


def run(options: GenerateOptions) -> int:
    """Generate, print, and return the exit status."""
    prompt = _prompt(options)
    from moetor.huggingface import fuse, loading

    quiet_transformers()
    model_name, revision, trusted = options.model, options.revision, options.trust_remote_code
    config = loading.load_config(model_name, revision=revision, trust_remote_code=trusted)
    tokenizer = loading.load_tokenizer(model_name, revision=revision, trust_remote_code=trusted)
    inputs = _tokens(options, tokenizer, prompt)
    _check_length(options, inputs["input_ids"].shape[1], loading.context_length(config))
    with progress(f"loading {model_name}", "tensors") as loaded:
        model = loading.load_model(
            model_name,
            dtype=options.dtype,
            device=options.device,
            revision=revision,
            trust_remote_code=trusted,
            progress=loaded,
        )
    report: FusionReport | None = None
    if options.level != "none":
        with progress(f"fusing {model_name}", "blocks") as fused:
            report = fuse(
                model,
                level=options.level,
                kernel=options.kernel,
                quantization=options.quantization,
                progress=fused,
            )
        if not report.blocks:
            note(f"{model_name} has no MoE blocks; nothing was fused")
        if report.quantized is not None:
            note(report.quantized)
    kernels = () if report is None else report.kernels

    stream = TextStream(tokenizer, _discard if options.json else _write)
    ends = _generate(options, model, tokenizer, inputs, stream)
    figures = stream.figures(kernels)
    if options.json:
        end = "stop" if stream.token_ids[-1] in ends else "length"
        print_json(
            {
                "model": model_name,
                "prompt": prompt,
                "text": stream.text,
                "prompt_token_ids": stream.prompt_ids,
                "token_ids": stream.token_ids,
                "finish_reason": end,
                "figures": asdict(figures),
                "fusion": None if report is None else report.to_dict(),
            }
        )
    else:
        print()
        note(str(figures))
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


def _tokens(options: GenerateOptions, tokenizer: Any, prompt: str) -> Any:
    """The prompt's token ids and attention mask, [1, T] each."""
    if not options.chat:
        inputs = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise UsageError(
            f"--chat: the tokenizer of {options.model!r} has no chat template; leave out --chat"
        )
    else:
        inputs = _chat_tokens(tokenizer, prompt)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt has no tokens; give at least one word")
    return inputs


def _chat_tokens(tokenizer: Any, prompt: str) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    except TemplateError as error:
        raise UsageError(f"--chat: the chat template refuses the prompt: {error}") from error


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


def _generate(
    options: GenerateOptions, model: Any, tokenizer: Any, inputs: Any, stream: TextStream
) -> tuple[int, ...]:
    """Run Transformers' own `generate`, streaming into `stream`.

    Returns:
        The tokens that end a text.
    """
    import torch
    from transformers import GenerationConfig

    theirs = model.generation_config
    ends = theirs.eos_token_id if theirs.eos_token_id is not None else tokenizer.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    padding = theirs.pad_token_id if theirs.pad_token_id is not None else next(iter(ends), None)
    # The model's own defaults would fill every value left open here (top_k, penalties, ...).
    model.generation_config = GenerationConfig(
        eos_token_id=ends or None, bos_token_id=theirs.bos_token_id, pad_token_id=padding
    )
    settings: dict[str, Any] = {"max_new_tokens": options.max_tokens, "do_sample": False}
    if options.temperature > 0:
        settings |= {"do_sample": True, "temperature": options.temperature}
        settings |= {"top_p": options.top_p, "top_k": 0}
    if options.seed is not None:
        torch.manual_seed(options.seed)
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    stream.start()
    model.generate(input_ids=ids, attention_mask=mask, streamer=stream, **settings)
    return tuple(ends)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(_text: str) -> None:
    pass
