"""The command line as a whole: it changes only when this list is changed with it."""

from __future__ import annotations

import argparse
import importlib
from typing import get_args

import pytest

from moetor.cli.main import COMMANDS, Command, command_parser
from moetor.cli.options import KernelName, QuantizationName
from moetor.quant_config import PRESETS

MODEL_FLAGS = {
    "model": "demo",
    "--kernel": "auto",
    "--dtype": "auto",
    "--device": "auto",
    "--revision": None,
    "--trust-remote-code": False,
    "--json": False,
    "--debug": False,
}
RANKS: dict[str, object] = {
    "-tp": 1,
    "--enable-expert-parallel": False,
    "--expert-parallel-size": None,
    "--sequence-parallel": False,
    "--enable-eplb": False,
    "--eplb-stats": None,
    "--num-redundant-experts": 0,
    "--collectives": "auto",
    "--parallel-timeout": 15.0,
}
PROMPTS_RANKS: dict[str, object] = {
    **RANKS,
    "-dp": 1,
    "--dispatcher": "auto",
    "--dispatch-dtype": "auto",
}
OFFLOAD: dict[str, object] = {
    "--cpu-experts": None,
    "--cpu-experts-cache": "auto",
    "--cpu-experts-stream": "auto",
    "--gpu-memory": None,
}
TEXT_BENCH: dict[str, object] = {
    **PROMPTS_RANKS,
    **OFFLOAD,
    "model": "demo",
    "--kernel": "auto",
    "--dtype": "auto",
    "--device": "auto",
    "--revision": None,
    "--trust-remote-code": False,
    "--load-format": "auto",
    "--layers": None,
    "--level": "auto",
    "--quantization": None,
    "--backend": "engine",
    "--peer": "none",
    "--input-len": 128,
    "--output-len": 128,
    "--cache": "static",
    "--compile": True,
    "--rounds": 3,
    "--seed": 0,
    "--max-model-len": None,
    "--max-num-seqs": 256,
    "--max-num-batched-tokens": 2048,
    "--block-size": 16,
    "--kv-cache-blocks": None,
    "--gpu-memory-utilization": 0.9,
    "--enable-prefix-caching": False,
    "--enforce-eager": False,
    "--fuse-dense": "auto",
    "--batch-invariant": False,
    "--record-expert-load": False,
    "--enable-return-routed-experts": False,
    "--json": None,
    "--debug": False,
}
SERVE_ENGINE = (
    "model",
    "--kernel",
    "--dtype",
    "--device",
    "--revision",
    "--trust-remote-code",
    "--load-format",
    "--level",
    "--seed",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--block-size",
    "--kv-cache-blocks",
    "--gpu-memory-utilization",
    "--enforce-eager",
    "--fuse-dense",
    "--batch-invariant",
    *PROMPTS_RANKS,
    *OFFLOAD,
)
SURFACE: dict[str, dict[str, object]] = {
    "generate": {
        **MODEL_FLAGS,
        **OFFLOAD,
        "--prompt": None,
        "--chat": False,
        "--max-tokens": 64,
        "--temperature": 0.0,
        "--top-p": 1.0,
        "--seed": None,
        "--level": "auto",
        "--batch-invariant": False,
        "--quantization": None,
        **RANKS,
    },
    "chat": {
        **MODEL_FLAGS,
        **OFFLOAD,
        "--system": None,
        "--max-tokens": 512,
        "--temperature": 0.7,
        "--top-p": 0.95,
        "--seed": None,
        "--level": "auto",
        "--batch-invariant": False,
        "--quantization": None,
        **RANKS,
    },
    "serve": {
        **{name: TEXT_BENCH[name] for name in TEXT_BENCH if name in SERVE_ENGINE},
        "--quantization": None,
        "--enable-prefix-caching": True,
        "--record-expert-load": True,
        "--enable-return-routed-experts": False,
        "--host": "127.0.0.1",
        "--port": 8000,
        "--api-key": None,
        "--api-key-file": None,
        "--api-key-env": None,
        "--served-model-name": (),
        "--chat-template": None,
        "--allow-image-host": (),
        "--allow-origins": (),
        "--stream-interval": 1,
        "--max-waiting": 1024,
        "--max-body-mib": 16.0,
        "--max-requests-per-minute": None,
        "--read-timeout": 60.0,
        "--write-timeout": 60.0,
        "--drain-timeout": 30.0,
        "--engine-timeout": 300.0,
        "--log-level": "info",
        "--log-interval": 10.0,
        "--otlp-traces-endpoint": None,
        "--expert-token-metrics": False,
        "--config": None,
        "--debug": False,
    },
    "explain": {
        **MODEL_FLAGS,
        **OFFLOAD,
        "--host-memory": None,
        "--level": "auto",
        "--quantization": None,
    },
    "verify": {**MODEL_FLAGS, "--level": "auto", "--quantization": None},
    "eval": {
        **{flag: MODEL_FLAGS[flag] for flag in MODEL_FLAGS if flag != "model"},
        **OFFLOAD,
        "tasks": None,
        "--model": "demo",
        "--level": "auto",
        "--quantization": None,
        "--include-path": None,
        "--num-fewshot": None,
        "--limit": None,
        "--batch-size": 8,
        "--apply-chat-template": False,
        "--seed": 1234,
        "--output": None,
    },
    "quantize": {
        "model": None,
        "out": None,
        "--format": "int4",
        "--revision": None,
        "--json": False,
        "--debug": False,
    },
    "experts": {
        **MODEL_FLAGS,
        "--level": "auto",
        "--quantization": None,
        "--prompt": None,
        "--file": None,
        "--max-tokens": 4096,
        "--plot": None,
        "--save-stats": None,
    },
    "eplb plan": {
        "stats": None,
        "--ranks": 2,
        "--num-redundant-experts": 0,
        "--policy": "auto",
        "--nodes": 1,
        "--groups": 1,
        "--json": False,
        "--plot": None,
        "--debug": False,
    },
    "bench layer": {
        "--shape": ("qwen3-30b-a3b",),
        "--tokens": (1, 8, 64, 512),
        "--dtype": "bfloat16",
        "--kernel": "auto",
        "--peers": ("eager", "grouped_mm", "batched_mm"),
        "--variants": (),
        "--quantization": (),
        "--device": "cpu",
        "--threads": None,
        "--routing": "uniform",
        "--seconds": None,
        "--seed": 0,
        "--json": None,
        "--plot": None,
        "--debug": False,
    },
    "tune": {
        "model": None,
        "--shape": (),
        "--tokens": (1, 4, 16, 64, 256, 1024, 4096),
        "--dtype": "bfloat16",
        "--seconds": 60.0,
        "--again": False,
        "--seed": 0,
        "--debug": False,
    },
    "bench shared": {
        "--layer": ("all",),
        "--tokens": (1, 4, 16, 64, 128, 256, 512, 1024),
        "--dtype": "bfloat16",
        "--seed": 0,
        "--json": None,
        "--debug": False,
    },
    "bench serve": {
        "--url": "http://127.0.0.1:8000",
        "--model": None,
        "--api-key-env": None,
        "--num-prompts": 100,
        "--input-len": 128,
        "--output-len": 128,
        "--request-rate": float("inf"),
        "--max-concurrency": None,
        "--vocab-size": None,
        "--seed": 0,
        "--json": None,
        "--debug": False,
    },
    "bench latency": TEXT_BENCH | {"--batch-size": (1,)},
    "bench throughput": TEXT_BENCH | {"--num-prompts": 64, "--batch-size": 32},
    "bench load": {
        "model": "demo",
        "--layers": None,
        "--dtype": "auto",
        "--device": "cpu",
        "--rounds": 3,
        "--json": None,
        "--debug": False,
    },
}


def named(name: str) -> Command:
    return next(command for command in COMMANDS if " ".join(command.words) == name)


def surface(parser: argparse.ArgumentParser) -> dict[str, object]:
    return {
        (action.option_strings or [action.dest])[0]: action.default
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    }


def test_the_commands() -> None:
    assert {" ".join(command.words) for command in COMMANDS} == set(SURFACE)


@pytest.mark.parametrize("name", SURFACE)
def test_the_flags_and_their_defaults(name: str) -> None:
    assert surface(command_parser(named(name))[0]) == SURFACE[name]


@pytest.mark.parametrize("name", SURFACE)
def test_the_help_explains_every_flag_and_gives_an_example(name: str) -> None:
    parser, options, _ = command_parser(named(name))
    text = parser.format_help()
    assert "examples:\n  moetor " + name in text
    assert text.isascii()
    for action in parser._actions:
        assert action.help, action
        assert (
            isinstance(action, argparse._HelpAction)
            or "(default: " in action.help
            or ("(required)" in action.help)
        )
    assert (options.__doc__ or "no docstring").splitlines()[0] in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
def test_the_examples_parse(command: Command) -> None:
    import shlex

    from moetor.cli.flags import parse_options

    parser, options, _ = command_parser(command)
    for example in command.examples:
        words = shlex.split(example.split(" < ")[0])
        assert words[: 1 + len(command.words)] == ["moetor", *command.words]
        parse_options(parser, options, words[1 + len(command.words) :])


def test_the_kernel_flag_offers_the_kernels_there_are() -> None:
    names = importlib.import_module("moetor.kernels.select").kernel_names()
    assert get_args(KernelName) == names


def test_the_quantisations_are_those_that_have_a_name() -> None:
    assert get_args(QuantizationName) == tuple(PRESETS)
