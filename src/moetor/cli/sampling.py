"""What `moetor generate` and `moetor chat` refuse of their sampling flags."""

from __future__ import annotations

from moetor.errors import InputError


def check_sampling(max_tokens: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Refuses numbers that no sampling has, named by their flags.

    Raises:
        InputError: says which.
    """
    if max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature {temperature:g} must be 0 or a positive number")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p:g} must be above 0 and at most 1")
    if seed is not None and not 0 <= seed < 2**64:
        raise InputError(f"--seed {seed} must be at least 0 and below 2^64")
