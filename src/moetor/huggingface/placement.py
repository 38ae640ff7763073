"""Models that accelerate has placed over several devices (`device_map`).

There every module has a hook around its forward, which moves what it is given to the module's
device. Hooks that only do that are put on the fused block in place of the original; hooks that also
fetch weights from elsewhere are not, and the block is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_HOOK = "_hf_hook"
OFFLOADED = (
    "accelerate keeps its weights elsewhere between calls (a device_map with offloading), and a "
    "fused block needs them in memory"
)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate fetches weights for the module or a part of it."""
    return any(
        getattr(hook, "offload", False) for part in module.modules() for hook in _hooks(part)
    )


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get(_HOOK)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))  # several are one in a row


def take_hook(module: nn.Module) -> Any | None:
    """Takes accelerate's hook off a module, which then has its own forward; None without one."""
    hook = module.__dict__.get(_HOOK)
    if hook is None:
        return None
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)
    own = getattr(module.__dict__.get("forward"), "__func__", None)
    if own is type(module).forward:
        del module.__dict__["forward"]  # accelerate leaves the bound method behind
    return hook


def put_hook(module: nn.Module, hook: Any) -> None:
    """Puts a hook of accelerate around a module's forward."""
    from accelerate.hooks import add_hook_to_module

    add_hook_to_module(module, hook)


@dataclass(frozen=True, slots=True)
class _Aside:
    """Hooks taken off one block.

    Attributes:
        hooks: by the path of the part inside the block; the block's own under "".
    """

    path: str
    block: nn.Module
    hooks: dict[str, Any]


@contextmanager
def hooks_aside(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Blocks without their hooks; afterwards those that are still in the model have them again, and
    what stands in a part's place has that part's.

    Args:
        blocks: path and module.
    """
    taken = []
    for path, block in blocks:
        if not is_offloaded(block):
            found = {name: take_hook(part) for name, part in list(block.named_modules())}
            hooks = {name: hook for name, hook in found.items() if hook is not None}
            taken.append(_Aside(path, block, hooks))
    try:
        yield
    finally:
        for aside in taken:
            _put_back(model, aside)


def _put_back(model: nn.Module, aside: _Aside) -> None:
    now = model.get_submodule(aside.path)
    for name, hook in aside.hooks.items():
        if now is not aside.block and name:
            continue  # inside a fused block everything is on its one device
        put_hook(now.get_submodule(name), hook)
