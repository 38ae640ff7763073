"""Cases of paged attention, for the CPU and the GPU.

Shape letters: T tokens, S sequences, N blocks, B tokens of a block, M blocks of a sequence,
Hq and Hkv heads, D width of queries and keys, Dv of values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PagedCase:
    """One call: lengths with and without the past, and the form."""

    id: str
    new: tuple[int, ...]
    lens: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (16, 16)
    block: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False


SMALL = (
    PagedCase(id="decode", new=(1, 1, 1), lens=(5, 137, 64)),
    PagedCase(id="one key", new=(1,), lens=(1,)),
    PagedCase(
        id="no new token, odd widths", new=(1, 0, 1), lens=(70, 33, 3), heads=(6, 2),
        widths=(24, 16), block=16, options={"window": 9},
    ),
    PagedCase(
        id="chunks", new=(1, 1), lens=(50, 49), heads=(5, 1), widths=(40, 32), block=5,
        options={"chunk": 16},
    ),
    PagedCase(
        id="softcap", new=(1, 1), lens=(50, 9), heads=(4, 4), block=16, options={"softcap": 5.0}
    ),
    PagedCase(id="sinks", new=(1, 1), lens=(90, 9), heads=(4, 4), block=16, sinks=True),
    PagedCase(id="mixed", new=(7, 1, 20, 0, 3), lens=(7, 30, 45, 6, 40)),
    PagedCase(
        id="mixed window sinks", new=(7, 1, 20), lens=(7, 30, 45), options={"window": 8}, sinks=True
    ),
    PagedCase(
        id="mixed chunks softcap", new=(7, 1, 20), lens=(7, 30, 45), heads=(6, 2),
        widths=(24, 16), block=8, options={"chunk": 16, "softcap": 3.0},
    ),
    PagedCase(id="prompt", new=(17,), lens=(33,), heads=(3, 1), widths=(48, 32), block=8),
)  # fmt: skip


def draw(case: PagedCase, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """The arguments of a call; blocks that no sequence has are full of NaN."""
    (heads, kv_heads), (width, value_width) = case.heads, case.widths
    sequences = len(case.lens)
    columns = max(-(-length // case.block) for length in case.lens) + 1
    blocks = sequences * columns + 3
    table = torch.randperm(blocks, generator=rng)[: sequences * columns].view(sequences, columns)
    keys = torch.full((blocks, case.block, kv_heads, width), torch.nan)
    values = torch.full((blocks, case.block, kv_heads, value_width), torch.nan)
    for seq, length in enumerate(case.lens):
        for place in range(length):
            block, offset = table[seq, place // case.block], place % case.block
            keys[block, offset] = torch.randn((kv_heads, width), generator=rng)
            values[block, offset] = torch.randn((kv_heads, value_width), generator=rng)
    drawn: dict[str, Any] = {
        "query": torch.randn((sum(case.new), heads, width), generator=rng).to(dtype),
        "key_cache": keys.to(dtype),
        "value_cache": values.to(dtype),
        "block_table": table.int(),
        "seq_lens": torch.tensor(case.lens).int(),
        "query_start": torch.tensor([0, *itertools.accumulate(case.new)]).int(),
        "scale": width**-0.5,
        **case.options,
    }
    if case.sinks:
        drawn["sinks"] = torch.randn(heads, generator=rng).to(dtype)
    return drawn


def expected(case: PagedCase, drawn: dict[str, Any]) -> Tensor:
    """[T, Hq, Dv] in float64, sequence by sequence with torch's own attention where it can."""
    outs = []
    groups = case.heads[0] // case.heads[1]
    first = 0
    for seq, (new, length) in enumerate(zip(case.new, case.lens, strict=True)):
        table = drawn["block_table"][seq].long()
        keys, values = (
            drawn[name][table].flatten(0, 1)[:length].double().repeat_interleave(groups, 1)
            for name in ("key_cache", "value_cache")
        )
        query = drawn["query"][first : first + new].double()
        first += new
        place = torch.arange(length, device=query.device)
        position = place[length - new :, None]
        mask = place <= position
        if "window" in case.options:
            mask &= place > position - case.options["window"]
        if "chunk" in case.options:
            mask &= place // case.options["chunk"] == position // case.options["chunk"]
        q, k, v = (x.transpose(0, 1) for x in (query, keys, values))
        if "softcap" not in case.options and not case.sinks:
            outs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=drawn["scale"]))
            continue
        raw = q @ k.transpose(1, 2) * drawn["scale"]
        if "softcap" in case.options:
            raw = case.options["softcap"] * (raw / case.options["softcap"]).tanh()
        power = raw.masked_fill(~mask, -torch.inf).exp()
        total = power.sum(-1, keepdim=True)
        if case.sinks:
            total = total + drawn["sinks"].double().exp()[:, None, None]
        outs.append(power / total @ v)
    return torch.cat([out.transpose(0, 1) for out in outs])


def largest_error(found: Tensor, oracle: Tensor) -> float:
    """Largest deviation; values are of the order of one. NaN is infinite."""
    error = (found.double() - oracle).abs().max().item()
    return error if error == error else float("inf")
