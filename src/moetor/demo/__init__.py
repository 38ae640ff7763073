"""The small trained Mixture-of-Experts model that ships in the package.

It lets every command, example and test run offline. `docs/demo-model.md` says what it is and how it
was trained.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["heldout_text", "model_path"]

_ROOT = Path(__file__).resolve().parent


def model_path() -> Path:
    """Folder of the model and its tokenizer, for any `from_pretrained`."""
    return _ROOT / "model"


def heldout_text() -> str:
    """The last 5% of the model's text, which neither the model nor its tokenizer was trained on."""
    return (_ROOT / "heldout.txt").read_text(encoding="utf-8")
