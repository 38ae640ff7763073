"""Where Moetor keeps what it made on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_root(environment: Mapping[str, str] | None = None) -> Path:
    """The user's cache folder for Moetor, by the XDG convention; it may not exist.

    Args:
        environment: in place of `os.environ`.
    """
    found = os.environ if environment is None else environment
    root = found.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moetor"
