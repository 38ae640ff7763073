"""Every error Moetor raises on purpose.

A message says what was asked, what is possible here, and what to do. All derive from `MoetorError`,
so a command can turn any of them into one line and an exit status.
"""

from __future__ import annotations


class MoetorError(Exception):
    """Base of every error raised on purpose; its text is meant for the person at the keyboard."""


class ConfigError(MoetorError, ValueError):
    """A configuration contradicts itself or lies outside what is defined (for example top_k >
    num_experts).
    """


class InputError(MoetorError, ValueError):
    """A tensor or an argument of a call has the wrong shape, dtype, device or range."""


class KernelRefusedError(MoetorError, ValueError):
    """The kernel that was named cannot run this case; the text gives its reason and the kernels
    that can.
    """


class UnsupportedError(MoetorError, NotImplementedError):
    """What was asked is well formed, and not possible here."""


class FusionError(MoetorError, RuntimeError):
    """`fuse` or `unfuse` was refused before anything was changed."""


class FusionMismatchError(FusionError):
    """A fused block does not reproduce the block it replaces; names the block and the error."""


class CheckpointError(MoetorError, ValueError):
    """A model path is missing, incomplete, corrupt or of a kind that is not read; names the
    file.
    """


class VersionError(MoetorError, ImportError):
    """torch or transformers lies outside the supported range; names the range."""


class ParallelError(MoetorError, RuntimeError):
    """Ranks disagree, died or did not answer in time; names the rank."""
