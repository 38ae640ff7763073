"""Command-line flags generated from a frozen dataclass, so that a default lives in one place.

A field's name gives the flag (`max_tokens` -> `--max-tokens`), its annotation the type, its default
the default, and its metadata the rest:

- `help`: what the flag does; the default is added to it.
- `metavar`: the word for the value in the help.
- `short`: another name of the flag, such as `-tp`.
- `positional`: the field is the command's argument instead of a flag; a list may be several words.
- `group`: heading under which the help lists the flag.
- `sets`: the configuration's field that the flag sets, where that has another name, for errors.
- `settings_file`: the value names a YAML file with further flags, which come before the line's own.

Annotations: `str`, `int`, `float`, `Path`, `bool` (a switch, `--no-...` where the default is True),
`Literal[...]` of strings, any of them `| None`, and `tuple[X, ...]` (a list with commas).
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from moetor.cli.flag_names import in_flags
from moetor.errors import MoetorError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
_SCALARS = (str, int, float, Path)


class UsageError(MoetorError, ValueError):
    """The command line asks for something that is not defined; exit status 2."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError`, so that an error is one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def add_flags(parser: argparse.ArgumentParser, options: type[DataclassInstance]) -> None:
    """Add one argument to `parser` for each field of the dataclass `options`.

    Raises:
        TypeError: a field's annotation has no command-line form, or its help is missing.
    """
    hints = get_type_hints(options)
    groups: dict[str, argparse._ArgumentGroup] = {}
    usage: dict[bool, list[str]] = {True: [], False: []}
    for field in dataclasses.fields(options):
        heading = field.metadata.get("group")
        if heading is not None and heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        target = parser if heading is None else groups[heading]
        names, settings = _argument(options, field, hints[field.name])
        argument = target.add_argument(*names, **settings)
        if field.metadata.get("positional"):
            usage[True].append(_usage(argument))
        elif argument.required:
            usage[False].append(f"{names[0]} {argument.metavar}")
    parser.usage = " ".join((parser.prog, *usage[True], *usage[False], "[flags]"))


def _usage(argument: argparse.Action) -> str:
    """A positional argument in the usage line."""
    if argument.nargs == "+":
        return f"{argument.metavar} [{argument.metavar} ...]"
    return f"[{argument.metavar}]" if argument.nargs else f"{argument.metavar}"


def parse_options(
    parser: argparse.ArgumentParser, options: type[Options], arguments: Sequence[str]
) -> Options:
    """The dataclass `options` filled from `arguments`; its own checks run when it is made.

    Raises:
        UsageError: the arguments do not parse, or the dataclass refuses them.
    """
    parsed = parser.parse_args(arguments)
    for field in dataclasses.fields(options):
        file = getattr(parsed, field.name)
        if field.metadata.get("settings_file") and file is not None:
            words = settings_words(parser, options, _read_settings(file), str(file))
            parsed = parser.parse_args([*words, *arguments])
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(options)}
    for name, value in values.items():
        if isinstance(value, list):  # words of a positional list, each with its own commas
            values[name] = tuple(part for word in value for part in word)
    try:
        return options(**values)
    except MoetorError as refusal:
        raise UsageError(in_flags(str(refusal), options, values)) from refusal


def settings_words(
    parser: argparse.ArgumentParser,
    options: type[DataclassInstance],
    settings: Mapping[Any, Any],
    where: str,
) -> list[str]:
    """Flags and their values as words of a command line; the argument becomes the default.

    Args:
        where: they stand, for errors.

    Raises:
        UsageError: one is no flag that can stand there, or lacks its value.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    words = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        field = fields.get(name)
        if field is None or field.metadata.get("settings_file"):
            raise UsageError(f"{where}: {key} is not a flag that can stand there")
        if isinstance(value, dict) or value is None:
            raise UsageError(f"{where}: {key} needs a value, or a list of them")
        flag = "--" + name.replace("_", "-")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if field.metadata.get("positional"):
            parser.set_defaults(**{name: text})
        elif not isinstance(field.default, bool):
            words.append(f"{flag}={text}")
        elif not isinstance(value, bool):
            raise UsageError(f"{where}: {key} is a switch; write true or false")
        elif value != field.default:
            words.append(flag if value else f"--no-{flag[2:]}")
    return words


def _read_settings(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise UsageError(f"{file} must have one flag a line, such as `port: 8001`")
    return read


def _argument(
    options: type[DataclassInstance], field: dataclasses.Field[Any], hint: Any
) -> tuple[list[str], dict[str, Any]]:
    """The positional and keyword arguments of `add_argument` for a field."""
    where = f"{options.__name__}.{field.name}"
    if "help" not in field.metadata:
        raise TypeError(f"{where} has no help in its metadata")
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if required else _default(field)
    text = f"{field.metadata['help']} ({_default_text(required, default)})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": default}
    flag = "--" + field.name.replace("_", "-")
    names = [field.metadata["short"], flag] if "short" in field.metadata else [flag]
    if hint is bool:
        if required:
            raise TypeError(f"{where} is a switch and needs a default")
        if default:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["action"] = "store_true"
        return names, settings
    settings |= _value_settings(where, hint)
    if "metavar" in field.metadata:
        settings["metavar"] = field.metadata["metavar"]
    if field.metadata.get("positional"):
        if get_origin(hint) is tuple:
            settings |= {"nargs": "+", "action": "extend"}
        elif not required:
            settings["nargs"] = "?"
        settings.setdefault("metavar", field.name.upper().replace("_", "-"))
        return [field.name], settings
    return names, settings | {"dest": field.name, "required": required}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _default_text(required: bool, default: Any) -> str:
    if required:
        return "required"
    if default is None:
        return "default: none"
    if isinstance(default, bool):
        return f"default: {'on' if default else 'off'}"
    if isinstance(default, tuple):
        return f"default: {','.join(map(str, default)) or 'none'}"
    return f"default: {default}"


def _value_settings(where: str, hint: Any) -> dict[str, Any]:
    """How argparse reads a value of the annotation `hint`."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        left = [kind for kind in inside if kind is not type(None)]
        if len(left) == 1:
            return _value_settings(where, left[0])
    elif origin is Literal and all(isinstance(choice, str) for choice in inside):
        return {"choices": inside}
    elif origin is tuple and len(inside) == 2 and inside[1] is Ellipsis:
        return {"type": _list_reader(where, inside[0])}
    elif hint in _SCALARS:
        return {"type": hint}
    raise TypeError(f"{where}: {hint} has no command-line form")


def _list_reader(where: str, hint: Any) -> Callable[[str], tuple[Any, ...]]:
    settings = _value_settings(where, hint)
    kind: Callable[[str], Any] = settings.get("type", str)
    choices: tuple[str, ...] | None = settings.get("choices")

    def read(text: str) -> tuple[Any, ...]:
        values = []
        for word in (part.strip() for part in text.split(",")):
            if choices is not None and word not in choices:
                raise argparse.ArgumentTypeError(
                    f"{word!r} is not one of {', '.join(choices)} (separate several with commas)"
                )
            try:
                values.append(kind(word))
            except ValueError:
                name = getattr(kind, "__name__", "value")
                raise argparse.ArgumentTypeError(
                    f"{word!r} in {text!r} is not of type {name} (separate several with commas)"
                ) from None
        return tuple(values)

    return read
