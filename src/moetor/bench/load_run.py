"""One load in a process of its own: `python -m moetor.bench.load_run HOW FOLDER DTYPE DEVICE`.

Prints what it took as JSON. A process of its own, because the highest memory of a process is
recorded once and never falls.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from moetor.bench.hardware import process_memory
from moetor.huggingface.devices import find_device, find_dtype
from moetor.huggingface.loading import load_config, load_model, model_class
from moetor.huggingface.model_classes import MoEForCausalLM, MoEForMultimodalLM

PAGE = 4096


def load(how: str, folder: str, dtype: str, device: str) -> Any:
    """The model: `fused`, `streamed` without fusing, or `transformers`."""
    if how == "streamed":
        return load_model(folder, dtype=dtype, device=device)
    config = load_config(folder)
    if how == "fused":
        multimodal = config.get_text_config() is not config
        entrance = MoEForMultimodalLM if multimodal else MoEForCausalLM
        return entrance.from_pretrained(folder, dtype=dtype, device=device, progress=False)
    target = find_device(device)
    options = {} if target.type == "cpu" else {"device_map": {"": target}}
    return model_class(config).from_pretrained(folder, dtype=find_dtype(dtype) or "auto", **options)


def touch(model: torch.nn.Module) -> None:
    """Reads every page of every parameter: a mapped file is not in memory before."""
    for parameter in model.parameters():
        parameter.detach().flatten().view(torch.uint8)[::PAGE].sum()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Loads, measures and prints."""
    how, folder, dtype, device = sys.argv[1:]
    before = process_memory("VmRSS")
    start = time.perf_counter()
    model = load(how, folder, dtype, device)
    returned = time.perf_counter() - start
    touch(model)
    ready = time.perf_counter() - start
    print(
        json.dumps(
            {
                "returned": returned,
                "ready": ready,
                "nbytes": sum(parameter.nbytes for parameter in model.parameters()),
                "before": before,
                "held": process_memory("VmRSS"),
                "peak": process_memory("VmHWM"),
            }
        )
    )


if __name__ == "__main__":
    main()
