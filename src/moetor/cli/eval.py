"""`moetor eval`: lm_eval's tasks with a fused model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetor.cli.console import note, print_json, quiet_transformers
from moetor.cli.flags import UsageError
from moetor.cli.loading import load_fused
from moetor.cli.options import MODEL, OUTPUT, ServedModelOptions, check_level
from moetor.errors import ConfigError
from moetor.output_paths import check_output_file

TASKS = "tasks"
_TOLD = ("results", "groups", "n-shot", "n-samples", "versions")
_EXTRA = ("lm_eval", "accelerate", "peft")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions(ServedModelOptions):
    """Measure a fused model with tasks of lm_eval (EleutherAI's evaluation harness).

    A task is one of lm_eval's own, whose data comes from the hub, or one that a YAML file in
    --include-path describes, whose data may lie on this machine. With --level none the same tasks
    run with plain Transformers.
    """

    tasks: tuple[str, ...] = field(
        metadata={
            "positional": True,
            "metavar": "TASK",
            "help": "task, group or tag; several in a row or with commas",
        }
    )
    model: str = field(
        default="demo",
        metadata={
            "group": MODEL,
            "metavar": "MODEL",
            "help": "folder or hub id of a Transformers model; demo ships in the package",
        },
    )
    include_path: Path | None = field(
        default=None,
        metadata={"group": TASKS, "metavar": "DIR", "help": "folder with tasks of your own"},
    )
    num_fewshot: int | None = field(
        default=None,
        metadata={
            "group": TASKS,
            "metavar": "N",
            "help": "examples before each question; without it, what the task says",
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"group": TASKS, "metavar": "N", "help": "the first N questions of each task"},
    )
    batch_size: int = field(
        default=8, metadata={"group": TASKS, "metavar": "N", "help": "texts in one model call"}
    )
    apply_chat_template: bool = field(
        default=False,
        metadata={"group": TASKS, "help": "put questions into the tokenizer's chat template"},
    )
    seed: int = field(
        default=1234,
        metadata={"group": TASKS, "metavar": "N", "help": "of the choice of examples"},
    )
    output: Path | None = field(
        default=None,
        metadata={
            "group": OUTPUT,
            "metavar": "FILE",
            "help": "write the results there, with every question and answer",
        },
    )

    def __post_init__(self) -> None:
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {value} must be at least {least}")
        check_output_file("--output", self.output)
        check_level(self)


def run(options: EvalOptions) -> int:
    """Evaluate, print lm_eval's table, and return the exit status."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import make_table
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in _EXTRA:
            raise
        raise UsageError(
            f"evaluation needs {missing.name}, which is not installed; pip install 'moetor[eval]'"
        ) from missing
    from moetor.huggingface import loading

    quiet_transformers()
    # It warns that a loaded model is not loaded again.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    manager = _task_manager(options)
    tokenizer = loading.load_tokenizer(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    if options.apply_chat_template and tokenizer.chat_template is None:
        raise UsageError(
            f"--apply-chat-template: the tokenizer of {options.model!r} has no chat template"
        )
    model, report = load_fused(options)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=options.batch_size,
            max_length=loading.context_length(model.config),
        ),
        tasks=list(options.tasks),
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        log_samples=options.output is not None,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    told: dict[str, Any] = {"model": options.model}
    told |= {name: results[name] for name in _TOLD if name in results}
    told["fusion"] = None if report is None else report.to_dict()
    if options.output is not None:
        _write(options.output, {**told, "samples": results["samples"]})
    if options.json:
        print_json(told)
        return 0
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    return 0


def _task_manager(options: EvalOptions) -> Any:
    """Knows the tasks that were asked for; lm_eval's own are only read where they are needed, as
    they are many thousand files.
    """
    from lm_eval.tasks import TaskManager

    unknown = set(options.tasks)
    manager: Any = None
    if options.include_path is not None:
        if not options.include_path.is_dir():
            raise UsageError(f"--include-path {options.include_path} is not a folder")
        manager = TaskManager(include_path=str(options.include_path), include_defaults=False)
        unknown -= set(manager.all_tasks)
    if unknown:
        folder = None if options.include_path is None else str(options.include_path)
        manager = TaskManager(include_path=folder)
        unknown -= set(manager.all_tasks)
    if unknown:
        raise UsageError(
            f"there is no task {', '.join(sorted(unknown))}; `lm_eval ls tasks` lists lm_eval's "
            "own, and --include-path names a folder with yours"
        )
    return manager


def _write(file: Path, told: dict[str, Any]) -> None:
    from moetor.cli.console import json_text

    file.write_text(json_text(told) + "\n", encoding="utf-8")
    note(f"wrote {file}")
