"""What a model's name stands for: a folder, the packaged demo, or a checkpoint of the hub; and
every failure to read it as one sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from moetor.demo import model_path
from moetor.errors import CheckpointError, MoetorError
from moetor.huggingface.checkpoint import first_line

DEMO = "demo"


def resolve(model: str) -> str:
    """What Transformers is to load for this name: the packaged demo's folder, a local folder, or a
    hub id.

    Raises:
        CheckpointError: neither a folder nor of the form owner/name.
    """
    if model == DEMO:
        return str(model_path())
    path = Path(model).expanduser()
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{model!r} has no config.json; give the folder of a Transformers checkpoint"
            )
        return str(path)
    if model and path.exists():
        raise CheckpointError(f"{model!r} is a file; give the folder that holds config.json")
    local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if local or not all(model.split("/")):
        raise CheckpointError(
            f"{model!r} is neither a folder nor a hub id (owner/name); 'demo' is the model that "
            "ships with moetor"
        )
    return model


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of a model's checkpoint.

    Raises:
        CheckpointError: it cannot be found.
    """
    with one_sentence(model):
        return local_folder(resolve(model), revision)


def local_folder(source: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; of a hub id its safetensors files are fetched first."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    wanted = ["model*.safetensors", "*.safetensors.index.json", "*.json"]
    return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))


@contextmanager
def one_sentence(model: str) -> Iterator[None]:
    """Turns what Transformers raises for a bad checkpoint into one sentence."""
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)  # its retries, one warning each
    try:
        yield
    except MoetorError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{model!r} needs a package that is missing: {first_line(error)}"
        ) from error
    except Exception as error:  # safetensors and strict configurations have classes of their own
        if "couldn't connect" in str(error) or "connection" in str(error).lower():
            raise CheckpointError(
                f"{model!r} is no local folder, not in the cache, and the hub cannot be reached; "
                "check the name or the network"
            ) from error
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{model!r} needs Python code that it brings along; read that code, and pass "
                "trust_remote_code=True to run it"
            ) from error
        raise CheckpointError(f"{model!r} cannot be loaded: {first_line(error)}") from error
    finally:
        hub_logger.setLevel(level)
