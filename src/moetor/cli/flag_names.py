"""What an error says of a configuration's fields, said of the flags that set them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_OWNER = re.compile(r"^\w+Config: ")


def in_flags(text: str, options: type[DataclassInstance], values: Mapping[str, Any]) -> str:
    """`text` with the command's flags in the places of the fields that it names.

    `name=value` becomes `--name value` for every field; a name alone only where it has an
    underscore, since others are words of the language too, or where the text begins with the
    configuration whose field it is (`ParallelConfig: eplb ...`). Names of which the command has no
    flag stay as they are.

    Args:
        options: the command's dataclass. A field that sets another configuration's under another
            name says so in its metadata: `sets`.
        values: of its fields; of several that set the same, the one that was given is named.
    """
    flags = dict(_flags(options, values))
    own = {field.metadata.get("sets") for field in dataclasses.fields(options)}
    names = "|".join(flags)
    alone = "|".join(name for name in flags if "_" in name or (name in own and _OWNER.match(text)))
    changed = re.sub(
        rf"(?<![-\w.=])(?:(?P<name>{names})=(?P<value>'[^']*'|[^\s,;:()]+)"
        rf"|(?P<alone>{alone or '(?!)'})\b(?![=.(/]))",
        lambda found: _named(found, flags),
        text,
    )
    return text if changed == text else _OWNER.sub("", changed)


def _flags(
    options: type[DataclassInstance], values: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Names that errors may have, each with its flag, and whether that is a switch."""
    fields = [
        field for field in dataclasses.fields(options) if not field.metadata.get("positional")
    ]
    # Those that were given come last, so that of several with one name they are kept.
    for field in sorted(fields, key=lambda field: values.get(field.name) != field.default):
        flag = "--" + field.name.replace("_", "-")
        switch = isinstance(field.default, bool)
        yield field.metadata.get("sets", field.name), (flag, switch)
        yield field.name, (flag, switch)


def _named(found: re.Match[str], flags: Mapping[str, tuple[str, bool]]) -> str:
    if found["name"] is None:
        return flags[found["alone"]][0]
    flag, switch = flags[found["name"]]
    value = found["value"].strip("'")
    if value == "True" and switch:
        return flag
    if value == "False" and switch:
        return f"--no-{flag[2:]}"
    return f"{flag} {value}"
