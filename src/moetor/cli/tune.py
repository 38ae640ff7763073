"""`moetor tune`: measures which tiles of the GPU kernels are fastest for a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moetor.bench.shapes import LayerShape, check_tokens, parse_shapes
from moetor.cli.console import note, print_table, progress
from moetor.errors import InputError, UnsupportedError
from moetor.progress import Progress

if TYPE_CHECKING:
    from moetor.bench.tuning import TuneRow

COLUMNS = ("shape", "up to T", "computed us", "tuned us", "gain", "tried", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """Measure which tiles of the Triton kernels are fastest for a layer on this GPU.

    For each number of tokens, the computed tiles and those around them are timed, with weights
    from memory, and the fastest are kept in the user's cache folder (XDG_CACHE_HOME, else
    ~/.cache). From then on the kernel takes them for calls of up to that many tokens, down to the
    next smaller power of two; batch-invariant layers do not. Without tuning tiles are computed
    from the shape. What was measured before is not measured again, and a run that was cut off is
    taken up.

    Shape letters: E experts, K experts per token (top_k), H hidden, I intermediate, T tokens.
    """

    model: str | None = field(
        default=None,
        metadata={
            "positional": True,
            "help": "folder or hub id of a Transformers model, or demo: the experts of its layers; "
            "only its configuration is read",
        },
    )
    shape: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "SHAPE,...",
            "help": "instead of a model: qwen3-30b-a3b, mixtral-8x7b, olmoe, gpt-oss-20b, "
            "deepseek-v3-ep8, all, or four numbers E,K,H,I",
        },
    )
    tokens: tuple[int, ...] = field(
        default=(1, 4, 16, 64, 256, 1024, 4096),
        metadata={"metavar": "T,...", "help": "tokens in a call; raised to powers of two"},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "of weights and hidden states"}
    )
    seconds: float = field(
        default=60.0, metadata={"metavar": "S", "help": "for each shape; what is found is kept"}
    )
    again: bool = field(default=False, metadata={"help": "measure what is kept once more"})
    seed: int = field(default=0, metadata={"help": "of weights, hidden states and routings"})

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.shape):
            raise InputError("name either a MODEL or --shape, for example --shape olmoe")
        if self.shape:
            parse_shapes(self.shape)
        check_tokens(self.tokens)
        if not self.seconds > 0:
            raise InputError(f"--seconds {self.seconds:g} must be positive")


def run(options: TuneOptions) -> int:
    """Measure, keep, print, and return the exit status: 1 where nothing could be measured."""
    import torch

    from moetor.bench.gpu_tuning import gpu_cases
    from moetor.bench.tuning import tune
    from moetor.kernels.triton import support, tuned
    from moetor.kernels.triton.choose import next_power_of_2

    refusal = support.device_refusal("cuda")
    if refusal is not None:
        raise UnsupportedError(
            f"moetor tune measures the Triton kernel, which {refusal}; there is nothing to tune"
        )
    index = torch.cuda.current_device()
    store = tuned.plans_of(index)
    counts = tuple(dict.fromkeys(next_power_of_2(count) for count in options.tokens))
    dtype, rows = getattr(torch, options.dtype), []
    for shape in _shapes(options):
        if options.again:
            store.drop(shape.experts, shape.top_k, dtype.itemsize, counts)
        cases = gpu_cases(shape, counts, dtype, support.gpu(index), options.seed)
        with progress(f"tuning {shape.name}", "sizes") as told, torch.inference_mode():
            found: list[TuneRow] = []

            def tell(line: str, told: Progress = told, found: list[TuneRow] = found) -> None:
                told(len(found), len(counts), line)

            for row in tune(cases, store, options.seconds, tell):
                found.append(row)
                tell("")
        rows += [[shape.name, *_cells(row)] for row in found]
        torch.cuda.empty_cache()
    tuned.forget()
    print_table("plans kept; gain: computed / tuned", COLUMNS, rows)
    note(f"kept in {store.path}")
    return 0 if any(row[2] for row in rows) else 1


def _shapes(options: TuneOptions) -> tuple[LayerShape, ...]:
    if options.model is None:
        return parse_shapes(options.shape)
    from moetor.huggingface.explaining import expert_forms

    forms = expert_forms(options.model)
    if not forms:
        raise InputError(f"{options.model!r} has no experts that a kernel of ours could run")
    return tuple(
        LayerShape(
            name=f"{one.num_experts},{top_k},{one.hidden_size},{one.intermediate_size}",
            top_k=top_k,
            experts=one,
        )
        for one, top_k in forms
    )


def _cells(row: TuneRow) -> list[str]:
    if row.found is None:
        return [str(row.tokens), "", "", "", str(row.tried), row.note]
    chosen, best = row.found.chosen_seconds, row.found.seconds
    return [
        str(row.tokens),
        f"{chosen * 1e6:.1f}",
        f"{best * 1e6:.1f}",
        f"{chosen / best:.2f}x",
        str(row.tried),
        row.note,
    ]
