"""What several configurations refuse."""

from __future__ import annotations

from moetor.errors import ConfigError


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{owner}: {name}={value!r} is not one of {', '.join(choices)}")


def check_positive(owner: str, **values: int) -> None:
    """Refuses values below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{owner}: {name}={value} must be at least 1")
