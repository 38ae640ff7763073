"""`moetor experts`: where a text's tokens go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moetor.cli.console import print_json, print_table, progress, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.options import OUTPUT, FusedModelOptions
from moetor.output_paths import check_output_file

if TYPE_CHECKING:
    from moetor.huggingface.expert_load import ExpertLoad

COLUMNS = ("layer", "experts", "busiest", "share", "entropy", "balanced", "unused", "dropped")
_WINDOW = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsOptions(FusedModelOptions):
    """Show which experts the tokens of a text go to.

    One line per MoE layer: the busiest expert and its share of all slots, the entropy of the shares
    (1 when all are equal), balancedness (mean load over the largest, 1 when all are equal), and the
    experts that no token chose. Without a text, the demo's held-out text is used.
    """

    prompt: str | None = field(
        default=None, metadata={"metavar": "TEXT", "help": "the text; - reads standard input"}
    )
    file: str | None = field(
        default=None, metadata={"metavar": "FILE", "help": "a file with the text, in UTF-8"}
    )
    max_tokens: int = field(
        default=4096, metadata={"metavar": "N", "help": "tokens of the text that are run at most"}
    )
    plot: Path | None = field(
        default=None,
        metadata={
            "group": OUTPUT,
            "metavar": "FILE.png",
            "help": "write a heat-map, layers against experts",
        },
    )
    save_stats: Path | None = field(
        default=None,
        metadata={
            "group": OUTPUT,
            "metavar": "FILE.json",
            "help": "write the counts for moetor eplb plan and --eplb-stats",
        },
    )

    def __post_init__(self) -> None:
        if self.prompt is not None and self.file is not None:
            raise UsageError("--prompt and --file both name a text; give one of them")
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens} must be at least 1")
        check_output_file("--plot", self.plot, ending=".png")
        check_output_file("--save-stats", self.save_stats)


def run(options: ExpertsOptions) -> int:
    """Count, print, draw, and return the exit status."""
    from moetor.bench.plot import check_plotting

    if options.plot is not None:
        check_plotting()
    text = _text(options)
    from moetor.huggingface import fuse, loading
    from moetor.huggingface.expert_load import expert_load

    quiet_transformers()
    revision, remote = options.revision, options.trust_remote_code
    config = loading.load_config(options.model, revision=revision, trust_remote_code=remote)
    tokenizer = loading.load_tokenizer(options.model, revision=revision, trust_remote_code=remote)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][: options.max_tokens]
    if ids.numel() == 0:
        raise UsageError("the text has no tokens; give at least one word")
    with progress(f"loading {options.model}", "tensors") as loaded:
        model = loading.load_model(
            options.model,
            dtype=options.dtype,
            device=options.device,
            revision=revision,
            trust_remote_code=remote,
            quantization=options.quantization,
            kernel=options.kernel,
            for_fusing=True,
            progress=loaded,
        )
    with progress(f"fusing {options.model}", "blocks") as fused:
        fuse(
            model,
            level=options.level,
            kernel=options.kernel,
            quantization=options.quantization,
            progress=fused,
        )
    context = loading.context_length(config)
    window = _WINDOW if context is None else min(_WINDOW, context)
    with progress("running the text", "tokens") as ran:
        load = expert_load(model, ids.to(model.device), window=window, progress=ran)
    if options.save_stats is not None:
        _save(load, options.model, options.save_stats)
    title = f"{options.model}: {load.tokens} tokens"
    if options.json:
        print_json({"model": options.model, **load.to_dict()})
    else:
        print_table(title, COLUMNS, _rows(load))
    if options.plot is not None:
        from moetor.cli.expert_map import draw_expert_map

        draw_expert_map(load, title, options.plot)
    return 0


def _save(load: ExpertLoad, model: str, path: Path) -> None:
    from moetor.parallel.eplb.statistics import save_loads

    try:
        save_loads(path, model, {layer.layer: layer.counts for layer in load.layers})
    except OSError as error:
        raise UsageError(f"--save-stats {path} cannot be written: {error}") from error


def _text(options: ExpertsOptions) -> str:
    import sys

    if options.file is not None:
        try:
            return Path(options.file).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--file {options.file} cannot be read: {error}") from error
    if options.prompt == "-":
        return sys.stdin.read()
    if options.prompt is not None:
        return options.prompt
    from moetor.demo import heldout_text

    return heldout_text()


def _rows(load: ExpertLoad) -> list[tuple[str, ...]]:
    return [
        (
            layer.layer,
            str(len(layer.counts)),
            str(layer.counts.index(max(layer.counts))),
            f"{layer.busiest_share:.1%}",
            f"{layer.entropy:.3f}",
            f"{layer.balancedness:.3f}",
            str(layer.unused),
            str(layer.dropped),
        )
        for layer in load.layers
    ]
