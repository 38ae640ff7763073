"""The server: an OpenAI API over the engine, metrics, and a page that shows the experts.

Needs the extra `moetor[serve]`. Names are loaded when they are used, so that settings can be read
without FastAPI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetor.server.app import create_app
    from moetor.server.config import ServerConfig

__all__ = ["ServerConfig", "create_app"]

_HOME_OF = {"ServerConfig": "config", "create_app": "app"}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
