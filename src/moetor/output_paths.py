"""Files and folders that are to be written, refused before the work whose result they hold."""

from __future__ import annotations

import os
from pathlib import Path

from moetor.errors import InputError


def check_output_file(flag: str, path: Path | None, *, ending: str | None = None) -> None:
    """Refuses a file that could not be written.

    Args:
        flag: that names it, for errors.
        path: None where none was asked for.
        ending: of its name, such as `.png`; None for any.

    Raises:
        InputError: says why not.
    """
    if path is None:
        return
    said = f"{flag} {path}"
    if os.path.isdir(path):
        raise InputError(f"{said}: that is a folder; name a file")
    if ending is not None and path.suffix.lower() != ending:
        kind = ending.removeprefix(".")
        raise InputError(f"{said}: what is written is a {kind.upper()}; name it FILE{ending}")
    folder = path.absolute().parent
    if not os.path.isdir(folder):
        raise InputError(f"{said}: there is no folder {path.parent}; make it first")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise InputError(f"{said}: it cannot be written by this user; name another place")


def check_output_folder(path: Path) -> None:
    """Refuses a folder that could not be made, or that holds something.

    Raises:
        InputError: says why not.
    """
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise InputError(f"{path} exists and is not an empty folder; name a new one")
    above = path.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not os.path.isdir(above):
        raise InputError(f"{path} cannot be made: {above} is a file; name another folder")
    if not os.access(above, os.W_OK):
        raise InputError(f"{path} cannot be made: {above} cannot be written by this user")
