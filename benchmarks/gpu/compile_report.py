"""Registers, spills and shared memory of the Triton kernels, for a GPU that need not be there.

    python benchmarks/gpu/compile_report.py [--capability 90] [--shared 232448] [--tokens 1 ...]

Compiles for the plans that `choose` makes and asks ptxas. Needs triton, no GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moetor.bench.shapes import SHAPES
from moetor.config import ExpertsConfig
from moetor.kernels.triton import choose, large_kernels, small_kernels


def report(kernel: Any, target: GPUTarget, types: dict[str, str], constants: dict[str, Any],
           options: dict[str, Any]) -> str:  # fmt: skip
    """One line: registers, spilled bytes, shared memory, and what the inner loop is made of."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride") or name == "up_offset"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=target, options=options)
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        suffix = "a" if target.arch >= 90 else ""
        tool = "ptxas-blackwell" if target.arch >= 100 else "ptxas"
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name=sm_{target.arch}{suffix}", path, "-o", f"{path}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    seen = {
        word: len(re.findall(pattern, ptx))
        for word, pattern in {
            "wgmma": r"wgmma\.mma_async",
            "mma": r"\bmma\.sync",
            "tcgen05": r"tcgen05\.mma",
            "tma": r"cp\.async\.bulk\.tensor",
            "cp.async": r"cp\.async\.cg|cp\.async\.ca",
            "ld16": r"ld\.global.*v4\.b32",
            "gdc": r"griddepcontrol",
        }.items()
    }
    found = " ".join(f"{word}={count}" for word, count in seen.items() if count)
    return (
        f"{kernel.__name__:10} regs {registers[1] if registers else '?':>3} "
        f"spill {spills[1] if spills else '?':>4} shared {built.metadata.shared:>6} {found}"
    )


def _form(config: ExpertsConfig) -> dict[str, Any]:
    return {
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "HAS_BIAS": config.has_bias,
        "WEIGHT_ON_INPUT": config.weight_on_input,
    }


def _up_form(config: ExpertsConfig) -> dict[str, Any]:
    return {
        "GATED": config.gated,
        "INTERLEAVED": config.interleaved,
        "ACT": choose.activation_constants(config.activation),
    }


def _types(config: ExpertsConfig, dtype: str, act: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of run-time arguments, and the unit stride as Triton specialises it."""
    types = dict.fromkeys(("hidden", "weight", "bias", "out", "slot_out"), f"*{dtype}")
    types |= {"act": f"*{act}", "topk_weights": "*fp32"}
    types |= dict.fromkeys(("ids", "order", "tile_expert", "tile_start", "tile_rows"), "*i32")
    types |= dict.fromkeys(
        ("slots", "tokens", "tiles", "up_offset", "stride_e", "stride_n", "stride_k"), "i32"
    )
    unit = "stride_n" if config.transposed else "stride_k"
    del types[unit]
    return types, {unit: 1}


def small(name: str, target: GPUTarget, dtype: torch.dtype, *, overlap: bool) -> list[str]:
    """Both launches of the small path."""
    top_k, config = SHAPES[name].top_k, SHAPES[name].experts
    plan = choose.small_plan(config, top_k, 1, dtype.itemsize)
    types, unit = _types(config, {2: "bf16", 4: "fp32"}[dtype.itemsize], "fp32")
    shared = _form(config) | unit | {"E": config.num_experts, "K": top_k, "PDL": overlap}
    tile = lambda t: {"BN": t.rows, "BK": t.depth, "STAGES": t.stages}  # noqa: E731
    pdl = {"launch_pdl": True} if overlap else {}
    down = shared | tile(plan.down) | {"KP": choose.next_power_of_2(top_k)}
    return [
        f"{plan.up} "
        + report(small_kernels.small_up, target, types, shared | _up_form(config) | tile(plan.up),
                 {"num_warps": plan.up.warps}),
        f"{plan.down} "
        + report(small_kernels.small_down, target, types, down,
                 {"num_warps": plan.down.warps} | pdl),
    ]  # fmt: skip


def large(name: str, target: GPUTarget, dtype: torch.dtype, tokens: int,
          device: choose.Device) -> list[str]:  # fmt: skip
    """Both products of the large path."""
    top_k, config = SHAPES[name].top_k, SHAPES[name].experts
    plan = choose.large_plan(config, top_k, tokens, dtype.itemsize, device)
    element = {2: "bf16", 4: "fp32"}[dtype.itemsize]
    lines = []
    for kernel, tile, extra in (
        (large_kernels.large_up, plan.up, _up_form(config) | {"K": top_k}),
        (large_kernels.large_down, plan.down, {}),
    ):
        types, unit = _types(config, element, element)
        if tile.tma:
            width = tile.columns * (2 if config.interleaved and extra else 1)
            block = (tile.depth, width) if config.transposed else (width, tile.depth)
            types["weight"] = f"tensordesc<{element}[{block[0]}, {block[1]}]>"
        constants = _form(config) | unit | extra
        constants |= {"TRANSPOSED": config.transposed, "TMA": tile.tma, "GROUP": tile.group}
        constants |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth}
        width = tile.columns * (2 if config.gated and extra else 1)
        bound = tile.shared_bytes(width=width, itemsize=dtype.itemsize)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        line = report(kernel, target, types, constants, options)
        lines.append(f"{tile} bound {bound}\n      {line}")
    return lines


def main() -> None:
    """Prints the report of every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--shared", type=int, default=232448)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 1024, 4096])
    parser.add_argument("--fp32", action="store_true")
    arguments = parser.parse_args()
    target = GPUTarget("cuda", arguments.capability, 32)
    device = choose.Device(sms=132, shared=arguments.shared,
                           capability=divmod(arguments.capability, 10))  # fmt: skip
    dtype = torch.float32 if arguments.fp32 else torch.bfloat16
    for name in arguments.shapes:
        for tokens in arguments.tokens:
            if tokens == 1:
                lines = small(name, target, dtype, overlap=arguments.capability >= 90)
            else:
                lines = large(name, target, dtype, tokens, device)
            for line in lines:
                print(f"{name} T={tokens}: {line}", flush=True)


if __name__ == "__main__":
    main()
