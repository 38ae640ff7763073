"""The releases of torch and Transformers that Moetor is made for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from moetor.errors import VersionError

SUPPORTED: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "torch": ((2, 11), None),
    "transformers": ((5, 17), (6, 0)),
}
"""Package: first supported release, and the first one that is not (None: no upper bound)."""


def check_versions() -> None:
    """Refuses releases outside the supported range.

    Raises:
        VersionError: names the release found, the range and the command that installs it.
    """
    for package, (low, high) in SUPPORTED.items():
        wanted = f">={low[0]}.{low[1]}" + (f",<{high[0]}" if high else "")
        remedy = f"install one with: pip install '{package}{wanted}'"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise VersionError(f"{package}{wanted} is needed and not installed; {remedy}") from None
        release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
        if release < low or (high is not None and release >= high):
            raise VersionError(f"{package} {found} is installed, {wanted} is supported; {remedy}")
