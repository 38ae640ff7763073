"""The launches around the experts on one GPU: ours against torch's, in CUDA graphs.

    python benchmarks/gpu/around_experts.py --out result.json [--batches 1 8 ...]
        [--contexts 128 1024 ...]

Shapes are those of Qwen3-30B-A3B (hidden 2048, 32 query heads, 4 key heads, heads of 128). A graph
holds several calls, each with weights or a cache of its own, so that they come from memory; the
graphs of all variants are replayed in turn; the figure is the median of a call's time. A product
or an attention has its share of the read bandwidth measured at the start. `chain` is all that
stands around a layer's experts at decode, with and without launches that overlap.

Shape letters: T tokens, S sequences, H hidden, N outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.bench.ceilings import measure_ceilings
from moetor.bench.hardware import describe_run
from moetor.kernels import dense
from moetor.kernels.attention import paged_attention as attention_in_torch
from moetor.kernels.dense import CacheSlots, Norm, RotaryForm
from moetor.kernels.triton import attention, support
from moetor.kernels.triton import dense as launches
from moetor.kernels.triton import rows as products
from moetor.kernels.triton.choose_attention import AttentionPlan, attention_plan

DTYPE = torch.bfloat16
HIDDEN, HEADS, KV_HEADS, WIDTH, BLOCK = 2048, 32, 4, 128, 16
PACKED = (HEADS + 2 * KV_HEADS) * WIDTH
PRODUCTS = {"qkv": (PACKED, HIDDEN), "o": (HIDDEN, HEADS * WIDTH), "gate": (128, HIDDEN),
            "head": (151936, HIDDEN)}  # fmt: skip
SETS = 24
_ROUNDS = 15

Call = Callable[[int], Tensor]


@dataclass(kw_only=True)
class Variant:
    """One implementation: `call(i)` computes with the weights or the cache of set i."""

    name: str
    call: Call = field(repr=False)
    times: list[float] = field(default_factory=list)
    error: float | None = None
    failed: str | None = None


@dataclass(kw_only=True)
class Case:
    """What is compared, and the bytes or operations that bound a call."""

    name: str
    sets: int
    variants: list[Variant]
    read: float = 0.0
    flops: float = 0.0
    oracle: Tensor | None = None


def normal(*size: int, std: float = 1.0) -> Tensor:
    """Normal values in bfloat16."""
    return torch.empty(size, dtype=DTYPE, device="cuda").normal_(std=std)


def product_cases(batches: list[int]) -> Iterator[Case]:
    """Products with few rows."""
    for name, (outputs, depth) in PRODUCTS.items():
        sets = 2 if name == "head" else SETS
        weights = [normal(outputs, depth, std=depth**-0.5) for _ in range(sets)]
        for rows in sorted({1, 2, 4, *batches[:3]}):
            x = normal(rows, depth)
            oracle = x.float() @ weights[0].float().T
            found = [Variant(name="torch", call=lambda i, x=x, w=weights: F.linear(x, w[i]))]
            if rows <= 8:
                chosen = products.rows_plan(outputs, depth, rows, 2, gated=False)
                plans = {chosen}
                tiles = ((1, 2048, 4), (2, 2048, 4), (4, 512, 4), (8, 512, 8), (4, 1024, 8))
                for tile in tiles if rows == 1 else tiles[1:3]:
                    plans.add(products.RowsPlan(*tile, 1, chosen.rows))
                for plan in sorted(plans, key=str):
                    label = f"ours {plan.outputs}x{plan.depth} w{plan.warps}"
                    found.append(
                        Variant(
                            name=label + (" *" if plan == chosen else ""),
                            call=lambda i, x=x, w=weights, p=plan: products.few_rows(
                                x, w[i], None, None, p
                            ),
                        )
                    )
            yield Case(name=f"{name} T={rows}", sets=sets, variants=found,
                       read=2.0 * outputs * depth, oracle=oracle)  # fmt: skip


def small_cases(batches: list[int]) -> Iterator[Case]:
    """Norm with residual, and norm, rotary positions and cache write in one."""
    norm = Norm(normal(HIDDEN), 1e-6)
    heads_norm = Norm(normal(WIDTH), 1e-6)
    for rows in batches:
        x, residual = normal(rows, HIDDEN), normal(rows, HIDDEN)
        yield Case(name=f"add+norm T={rows}", sets=SETS, variants=[
            Variant(name="ours", call=lambda i, x=x, r=residual:
                    launches.add_rms_norm(x, r, norm)[0]),
            Variant(name="torch", call=lambda i, x=x, r=residual:
                    F.rms_norm(x + r, (HIDDEN,), norm.weight, norm.eps)),
        ])  # fmt: skip
        q, k, v, cos, sin, cache = rotary_inputs(rows)
        yield Case(name=f"norm+rotary+write T={rows}", sets=SETS, variants=[
            Variant(name="ours", call=lambda i, a=(q, k, v, cos, sin), c=cache:
                    launches.rotate(*a, RotaryForm(width=WIDTH), heads_norm, heads_norm, c)[0]),
            Variant(name="write alone", call=lambda i, k=k, v=v, c=cache:
                    write_alone(k, v, c)),
        ])  # fmt: skip


def write_alone(key: Tensor, value: Tensor, cache: CacheSlots) -> Tensor:
    """The cache write without anything else."""
    launches.write_to_cache(key, value, cache)
    return key


def rotary_inputs(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, CacheSlots]:
    """Queries, keys, values, cos, sin and slots."""
    packed = normal(rows, PACKED)
    q, k, v = packed.split([HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH], dim=1)
    q, k, v = q.view(rows, HEADS, WIDTH), k.view(rows, -1, WIDTH), v.view(rows, -1, WIDTH)
    slots = torch.randperm(max(64, rows), device="cuda")[:rows]
    blocks = -(-max(64, rows) // BLOCK)
    cache = CacheSlots(*(normal(blocks, BLOCK, KV_HEADS, WIDTH) for _ in range(2)), slots)
    return q, k, v, normal(rows, WIDTH), normal(rows, WIDTH), cache


def paged(sequences: int, context: int, new: int, sets: int) -> list[dict[str, Any]]:
    """Arguments of attention: `sets` caches, blocks in random order."""
    columns = -(-context // BLOCK)
    made = []
    for _ in range(sets):
        table = torch.randperm(sequences * columns, device="cuda").view(sequences, columns)
        made.append({
            "query": normal(sequences * new, HEADS, WIDTH),
            "key_cache": normal(sequences * columns, BLOCK, KV_HEADS, WIDTH),
            "value_cache": normal(sequences * columns, BLOCK, KV_HEADS, WIDTH),
            "block_table": table.int(),
            "seq_lens": torch.full((sequences,), context, device="cuda").int(),
            "query_start": (new * torch.arange(sequences + 1, device="cuda")).int(),
        })  # fmt: skip
    return made


def with_plan(given: list[dict[str, Any]], plan: AttentionPlan, decode: bool) -> Call:
    """Attention with these tiles."""
    return lambda i: attention.run_attention(
        **given[i], plan=plan, decode=decode, scale=WIDTH**-0.5, softcap=None, window=None,
        chunk=None, sinks=None,
    )  # fmt: skip


def plan_of(sequences: int, context: int, new: int) -> AttentionPlan:
    """The tiles that the kernel would choose."""
    device = support.gpu(0)
    return attention_plan(
        sequences=sequences, kv_heads=KV_HEADS, group=HEADS // KV_HEADS, width=WIDTH,
        value_width=WIDTH, max_keys=context, max_query_len=new, itemsize=2, sms=device.sms,
        shared=device.shared,
        overlap=device.capability >= (9, 0),
    )  # fmt: skip


def decode_cases(batches: list[int], contexts: list[int]) -> Iterator[Case]:
    """One new token for each sequence."""
    for sequences in batches:
        for context in contexts:
            size = 2 * sequences * context * KV_HEADS * WIDTH * 2
            if size > 1.2e9:
                continue
            sets = max(2, min(SETS, int(2e9 // size)))
            given = paged(sequences, context, 1, sets)
            chosen = plan_of(sequences, context, 1)
            plans = [chosen]
            if context == contexts[len(contexts) // 2] and sequences in (1, 8, 128):
                plans += [
                    replace(chosen, splits=splits)
                    for splits in (chosen.splits // 4, chosen.splits // 2, chosen.splits * 2)
                    if 1 <= splits <= 64
                ]
                others = {"keys": 96 - chosen.keys, "warps": 8, "stages": 3}
                plans += [replace(chosen, **{name: value}) for name, value in others.items()]
                plans.append(replace(chosen, warps=2))
            found = [
                Variant(name=f"ours k{p.keys} s{p.splits} w{p.warps} st{p.stages}"
                        + (" *" if p == chosen else ""), call=with_plan(given, p, True))
                for p in plans
            ]  # fmt: skip
            keys, values = (
                [normal(sequences, KV_HEADS, context, WIDTH) for _ in range(sets)] for _ in range(2)
            )
            found.append(
                Variant(
                    name="sdpa, not paged",
                    call=lambda i, g=given, k=keys, v=values: F.scaled_dot_product_attention(
                        g[i]["query"][:, :, None], k[i], v[i], enable_gqa=True
                    ),
                )
            )
            oracle = attention_in_torch(**given[0], scale=WIDTH**-0.5).float()
            yield Case(name=f"decode S={sequences} L={context}", sets=sets, variants=found,
                       read=float(size), oracle=oracle)  # fmt: skip
            del given, keys, values, found


def prompt_cases() -> Iterator[Case]:
    """Prompts without a past."""
    for sequences, length in ((16, 2048), (4, 512)):
        given = paged(sequences, length, length, 1)
        chosen = plan_of(sequences, length, length)
        plans = [chosen, replace(chosen, stages=2), replace(chosen, keys=128)]
        plans += [replace(chosen, keys=128, stages=2), replace(chosen, keys=32)]
        found = [
            Variant(name=f"ours r{p.rows} k{p.keys} w{p.warps} st{p.stages}",
                    call=with_plan(given, p, False))
            for p in plans
        ]  # fmt: skip
        q, k, v = (normal(sequences, heads, length, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
        found.append(
            Variant(
                name="sdpa, not paged",
                call=lambda i, q=q, k=k, v=v: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
            )
        )
        flops = 4.0 * sequences * HEADS * WIDTH * length * (length + 1) / 2
        yield Case(name=f"prompt S={sequences} L={length}", sets=1, variants=found, flops=flops,
                   oracle=first_sequence(given[0]))  # fmt: skip


def first_sequence(given: dict[str, Any]) -> Tensor:
    """Attention of the first sequence alone, in float32."""
    short = given | {"seq_lens": given["seq_lens"][:1], "block_table": given["block_table"][:1],
                     "query_start": given["query_start"][:2]}  # fmt: skip
    tokens = int(given["query_start"][1])
    return attention_in_torch(**(short | {"query": given["query"][:tokens]}),
                              scale=WIDTH**-0.5).float()  # fmt: skip


def chain_case(sequences: int, context: int) -> Case:
    """Norm, QKV, head norms with rotary and write, attention, output product, norm, gate."""
    sets = 16
    weights = {name: [normal(*size, std=size[1] ** -0.5) for _ in range(sets)]
               for name, size in PRODUCTS.items() if name != "head"}  # fmt: skip
    norm, heads_norm = Norm(normal(HIDDEN), 1e-6), Norm(normal(WIDTH), 1e-6)
    given = paged(sequences, context, 1, sets)
    x, residual = normal(sequences, HIDDEN), normal(sequences, HIDDEN)
    cos, sin = normal(sequences, WIDTH), normal(sequences, WIDTH)
    sizes = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]

    def call(i: int) -> Tensor:
        one = given[i]
        normed, total = dense.add_rms_norm(x, residual, norm)
        parts = dense.linear(normed, weights["qkv"][i]).split(sizes, dim=1)
        q, k, v = (part.view(sequences, -1, WIDTH) for part in parts)
        cache = CacheSlots(one["key_cache"], one["value_cache"], slots[i])
        q, _ = dense.rotate(q, k, v, cos, sin, RotaryForm(width=WIDTH),
                            query_norm=heads_norm, key_norm=heads_norm, cache=cache)  # fmt: skip
        out = attention.paged_attention(**(one | {"query": q}), max_query_len=1, scale=WIDTH**-0.5)
        out = dense.linear(out.flatten(1), weights["o"][i])
        normed, _ = dense.add_rms_norm(out, total, norm)
        return dense.linear(normed, weights["gate"][i])

    slots = [one["block_table"][:, -1].long() * BLOCK + (context - 1) % BLOCK for one in given]
    own = support.overlap

    def without(i: int) -> Tensor:
        support.overlap = lambda tensor: False
        try:
            return call(i)
        finally:
            support.overlap = own

    read = 2.0 * sum(size[0] * size[1] for name, size in PRODUCTS.items() if name != "head")
    read += 2 * sequences * context * KV_HEADS * WIDTH * 2
    return Case(
        name=f"chain S={sequences} L={context}", sets=sets, read=read,
        variants=[Variant(name="ours", call=call),
                  Variant(name="ours, only attention overlaps", call=without)],
    )  # fmt: skip


def capture(case: Case, variant: Variant) -> torch.cuda.CUDAGraph | None:
    """Checks the first call, then captures one call for each set."""
    try:
        torch.full((2**22,), float("nan"), device="cuda", dtype=DTYPE)
        out = variant.call(0)
        if case.oracle is not None:
            found = out.float().reshape(-1)[: case.oracle.numel()]
            if "sdpa" not in variant.name:
                wanted = case.oracle.reshape(-1)
                variant.error = float((found - wanted).norm() / wanted.norm())
                if not variant.error < 1e-2:
                    raise RuntimeError(f"relative error {variant.error:.1e}")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(case.sets):
                variant.call(i)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # a variant that fails must not end the run
        variant.failed = f"{type(error).__name__}: {error}"[:200]
        return None
    return graph


def run(case: Case, read: float, flops: float) -> dict[str, Any]:
    """Times a case's variants in turn and prints a line for each."""
    graphs = [(variant, capture(case, variant)) for variant in case.variants]
    for _ in range(_ROUNDS):
        for variant, graph in graphs:
            if graph is None:
                continue
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            variant.times.append(start.elapsed_time(stop) * 1e3 / case.sets)
    floor = 1e6 * max(case.read / read, case.flops / flops)
    rows = []
    for variant in case.variants:
        took = statistics.median(variant.times) if variant.times else None
        share = f"{floor / took:5.0%}" if took and floor else ""
        text = variant.failed or f"{took:9.2f} us {share}"
        print(f"{case.name:28} floor {floor:8.2f}  {variant.name:30} {text}", flush=True)
        rows.append({"variant": variant.name, "us": took, "error": variant.error,
                     "failed": variant.failed})  # fmt: skip
    return {"case": case.name, "floor_us": floor, "variants": rows}


def main() -> None:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 512, 1024, 4096])
    kinds = ("chain", "product", "small", "decode", "prompt")
    parser.add_argument("--cases", nargs="*", default=list(kinds), choices=kinds)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ceilings = measure_ceilings("cuda", DTYPE)
    read, flops = ceilings.read_bytes_per_s, max(ceilings.gemm_flops_per_s.values())
    print(f"read {read / 1e12:.2f} TB/s, products {flops / 1e12:.0f} TFLOP/s", flush=True)
    batches, contexts = arguments.batches, arguments.contexts
    results = []
    with torch.no_grad():
        cases = {
            "chain": (chain_case(*size) for size in ((1, 128), (1, 1024), (8, 512), (32, 512))),
            "product": product_cases(batches),
            "small": small_cases(batches),
            "decode": decode_cases(batches, contexts),
            "prompt": prompt_cases(),
        }
        for kind in arguments.cases:
            for case in cases[kind]:
                results.append(run(case, read, flops))
            torch.cuda.empty_cache()
    made = {
        "command": " ".join(sys.argv),
        "run": describe_run("cuda", torch.get_num_threads()),
        "read_bytes_per_s": read,
        "gemm_flops_per_s": flops,
        "results": results,
    }
    arguments.out.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
