"""Entry point of `moetor`: finds the command, turns errors into one line and an exit status.

A command's module is imported only when that command runs, and its heavy imports happen inside its
functions, so that `moetor --help` answers at once.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moetor import __version__
from moetor.cli.console import fail
from moetor.cli.flag_names import in_flags
from moetor.cli.flags import Parser, UsageError, add_flags, parse_options
from moetor.errors import MoetorError
from moetor.parallel.launch import is_rank, launch, python_command, tell_launcher

OK, FAILURE, BAD_USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command: its words, the module that runs it, and what the help says.

    The module has the dataclass named `options` and `run(options) -> int`.
    """

    words: tuple[str, ...]
    module: str
    options: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = (
    Command(
        words=("generate",),
        module="moetor.cli.generate",
        options="GenerateOptions",
        summary="continue a prompt with a fused model, as the text is produced",
        examples=(
            'moetor generate --prompt "ROMEO:"',
            'moetor generate ./Qwen3-30B-A3B --chat --prompt "Why is the sky blue?"',
            'moetor generate --prompt "ROMEO:" --temperature 0.8 --top-p 0.9 --seed 1 --json',
            "moetor generate --prompt - < prompt.txt",
        ),
    ),
    Command(
        words=("chat",),
        module="moetor.cli.chat",
        options="ChatOptions",
        summary="talk with a fused model",
        examples=(
            "moetor chat",
            'moetor chat ./Qwen3-30B-A3B --system "Answer in one sentence." --temperature 0.6',
            "moetor chat ./Qwen3-30B-A3B -tp 2 --enable-expert-parallel",
        ),
    ),
    Command(
        words=("serve",),
        module="moetor.cli.serve",
        options="ServeOptions",
        summary="serve an OpenAI API, metrics, and a page that shows the experts",
        examples=(
            "moetor serve",
            "moetor serve ./Qwen3-30B-A3B --host 0.0.0.0 --api-key-file key.txt",
            "moetor serve --port 8001 --max-num-seqs 64",
            "moetor serve ./Qwen3-30B-A3B -dp 4 --enable-expert-parallel",
        ),
    ),
    Command(
        words=("explain",),
        module="moetor.cli.explain",
        options="ExplainOptions",
        summary="show what would be fused and how, from the configuration alone",
        examples=(
            "moetor explain",
            "moetor explain ./Mixtral-8x7B-v0.1 --dtype bfloat16",
            "moetor explain ./Mixtral-8x7B-v0.1 --kernel native --json",
        ),
    ),
    Command(
        words=("verify",),
        module="moetor.cli.verify",
        options="VerifyOptions",
        summary="compare the fused model with the original, block by block and in its logits",
        examples=("moetor verify", "moetor verify ./OLMoE-1B-7B-0924 --dtype bfloat16"),
    ),
    Command(
        words=("eval",),
        module="moetor.cli.eval",
        options="EvalOptions",
        summary="measure a fused model with tasks of lm_eval",
        examples=(
            "moetor eval arc_easy hellaswag --model ./OLMoE-1B-7B-0924 --limit 100",
            "moetor eval my_task --include-path ./tasks --json",
        ),
    ),
    Command(
        words=("quantize",),
        module="moetor.cli.quantize",
        options="QuantizeOptions",
        summary="write a checkpoint whose experts are quantised",
        examples=(
            "moetor quantize demo ./demo-int4",
            "moetor quantize ./OLMoE-1B-7B-0924 ./OLMoE-fp8 --format fp8_block",
        ),
    ),
    Command(
        words=("experts",),
        module="moetor.cli.experts",
        options="ExpertsOptions",
        summary="show which experts the tokens of a text go to",
        examples=(
            "moetor experts",
            'moetor experts --prompt "To be, or not to be" --json',
            "moetor experts ./OLMoE-1B-7B-0924 --file book.txt --plot experts.png",
        ),
    ),
    Command(
        words=("eplb", "plan"),
        module="moetor.cli.eplb",
        options="EplbPlanOptions",
        summary="place experts on ranks for a recorded load",
        examples=(
            "moetor eplb plan load.json --ranks 4 --num-redundant-experts 4 --plot plan.png",
            "moetor eplb plan load.json --ranks 16 --nodes 2 --groups 8 --json",
        ),
    ),
    Command(
        words=("tune",),
        module="moetor.cli.tune",
        options="TuneOptions",
        summary="measure the fastest tiles of the GPU kernels for a layer, and keep them",
        examples=("moetor tune ./OLMoE-1B-7B-0924", "moetor tune --shape olmoe --tokens 1,16"),
    ),
    Command(
        words=("bench", "layer"),
        module="moetor.cli.bench",
        options="LayerBenchOptions",
        summary="time one MoE layer against Transformers and the machine's measured limits",
        examples=(
            "moetor bench layer --shape olmoe --tokens 1,8,64,512",
            "moetor bench layer --shape 64,8,2048,1024 --dtype bfloat16",
        ),
    ),
    Command(
        words=("bench", "shared"),
        module="moetor.cli.bench_shared",
        options="SharedBenchOptions",
        summary="time layers with shared experts, on one stream and on two",
        examples=("moetor bench shared", "moetor bench shared --layer qwen2-57b-a14b --tokens 1"),
    ),
    Command(
        words=("bench", "serve"),
        module="moetor.cli.bench_serve",
        options="ServeBenchOptions",
        summary="put load on a running server and time what its clients see",
        examples=(
            "moetor bench serve --num-prompts 200 --max-concurrency 32",
            "moetor bench serve --url http://host:8000 --request-rate 4",
        ),
    ),
    Command(
        words=("bench", "latency"),
        module="moetor.cli.bench_text",
        options="LatencyOptions",
        summary="time the first token and those after it, of one batch",
        examples=(
            "moetor bench latency",
            "moetor bench latency qwen3-30b-a3b --load-format dummy --batch-size 1,8,32",
        ),
    ),
    Command(
        words=("bench", "throughput"),
        module="moetor.cli.bench_text",
        options="ThroughputOptions",
        summary="time many prompts",
        examples=(
            "moetor bench throughput --num-prompts 16",
            "moetor bench throughput qwen3-30b-a3b --load-format dummy --batch-size 64",
            "moetor bench throughput ./Qwen3-30B-A3B --batch-size 256 -tp 2",
        ),
    ),
    Command(
        words=("bench", "load"),
        module="moetor.cli.bench_load",
        options="LoadBenchOptions",
        summary="time loading a checkpoint, and its memory, beside Transformers",
        examples=(
            "moetor bench load",
            "moetor bench load qwen3-30b-a3b --layers 3 --json load.json",
        ),
    ),
)

GROUPS: dict[tuple[str, ...], str] = {
    (): "Mixture-of-Experts models of Hugging Face Transformers, fused and fast.",
    ("bench",): "Measurements.",
    ("eplb",): "Expert-parallel load balancing.",
}

DEBUG_HELP = "print the traceback of an error instead of one line (default: off)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Taken out first, so that it works in any place and also for errors in the rest of the line.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        try:
            status = _dispatch(arguments)
        except SystemExit:  # argparse, after --help or --version
            status = OK
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        fail("interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif not tell_launcher(_one_line(error)):
            fail(_one_line(error))
        return BAD_USAGE if isinstance(error, UsageError) else FAILURE


def command_parser(command: Command) -> tuple[Parser, type[Any], Any]:
    """The parser of `command`, its options dataclass and its module, imported now."""
    module = importlib.import_module(command.module)
    options: type[Any] = getattr(module, command.options)
    parser = Parser(
        prog=f"moetor {' '.join(command.words)}",
        description=inspect.getdoc(options) or command.summary,
        epilog="\n".join(("examples:", *(f"  {example}" for example in command.examples))),
    )
    add_flags(parser, options)
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    return parser, options, module


def _dispatch(arguments: list[str]) -> int:
    """Follow the words of the command line to a command and run it."""
    words: tuple[str, ...] = ()
    reached: tuple[Command, ...] = COMMANDS
    while reached[0].words != words:
        rest = arguments[len(words) :]
        names = list(dict.fromkeys(command.words[len(words)] for command in reached))
        if not rest or rest[0] not in names:
            return _stop_short(words, reached, names, rest)
        words = (*words, rest[0])
        reached = tuple(command for command in reached if command.words[: len(words)] == words)
    parser, options, module = command_parser(reached[0])
    chosen = parse_options(parser, options, arguments[len(words) :])
    processes = getattr(chosen, "processes", 1)
    if processes > 1 and not is_rank():
        if getattr(chosen, "converses", False):
            return launch(python_command(arguments), processes, converses=True)
        return _launch(arguments, processes, drains=getattr(chosen, "drains", False))
    try:
        return int(module.run(chosen))
    except MoetorError as error:
        values = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
        error.args = (in_flags(str(error), options, values),)
        raise


def _launch(arguments: list[str], ranks: int, *, drains: bool) -> int:
    """Runs the same line as several ranks; what standard input holds is given to each of them."""
    if "-" not in arguments or sys.stdin.isatty():
        return launch(python_command(arguments), ranks, drains=drains)
    with tempfile.NamedTemporaryFile(prefix="moetor-stdin-") as given:
        given.write(sys.stdin.buffer.read())
        given.flush()
        return launch(python_command(arguments), ranks, stdin=Path(given.name))


def _stop_short(
    words: tuple[str, ...], reached: Sequence[Command], names: list[str], rest: list[str]
) -> int:
    """Answer a line that names no command: help, version, or an error."""
    parser = _overview(words, reached)
    if rest and not rest[0].startswith("-"):
        parser.error(f"there is no command {rest[0]!r}; the commands are {', '.join(names)}")
    parser.parse_args(rest)
    parser.error(f"name a command: {', '.join(names)}")


def _overview(words: tuple[str, ...], reached: Sequence[Command]) -> Parser:
    """The parser of `moetor` itself or of a group of commands: help and version."""
    prog = " ".join(("moetor", *words))
    width = max(len(" ".join(command.words)) for command in reached)
    lines = ["commands:"]
    lines += [f"  {' '.join(command.words):{width}}  {command.summary}" for command in reached]
    lines += [""]
    if not words:
        lines += [
            "MODEL is a folder or a hub id; where it is left out, the demo in the package is used."
        ]
    lines += [f"`{prog} COMMAND --help` explains a command and its flags."]
    lines += ["", "example:", f"  {reached[0].examples[0]}"]
    parser = Parser(prog=prog, description=GROUPS[words], epilog="\n".join(lines))
    parser.usage = f"{prog} COMMAND ..."
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    if not words:
        version = f"moetor {__version__}"
        parser.add_argument(
            "--version", action="version", version=version, help="print the version and exit"
        )
    return parser


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MoetorError):
        return text
    return f"unexpected {type(error).__name__}: {text} (run again with --debug to see where)"


def _discard_stdout() -> None:
    # The reader is gone; without this the interpreter complains when it flushes at exit.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # standard output is not a file here, so nothing is flushed to it at exit
