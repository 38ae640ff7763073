"""From a path, a hub id or `demo` to a configuration, a tokenizer and a model; every failure is
one sentence.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moetor.demo import model_path
from moetor.errors import CheckpointError, ConfigError

DEMO = "demo"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CONTEXT_ATTRIBUTES = (
    "max_position_embeddings",
    "max_sequence_length",
    "n_positions",
    "seq_length",
)
_BYTES_OF = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
LoadProgress = Callable[[int, int], None]
"""`progress(done, total)` in weights."""


def resolve(model: str) -> str:
    """What Transformers is to load for this name: the packaged demo's folder, a local folder, or a
    hub id.

    Raises:
        CheckpointError: neither a folder nor of the form owner/name.
    """
    if model == DEMO:
        return str(model_path())
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{model!r} has no config.json; give the folder of a Transformers checkpoint"
            )
        return str(path)
    if path.exists():
        raise CheckpointError(f"{model!r} is a file; give the folder that holds config.json")
    local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if local or not all(model.split("/")):
        raise CheckpointError(
            f"{model!r} is neither a folder nor a hub id (owner/name); 'demo' is the model that "
            "ships with moetor"
        )
    return model


def load_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    with _one_sentence(model):
        return AutoConfig.from_pretrained(
            resolve(model), revision=revision, trust_remote_code=trust_remote_code
        )


def load_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The model's tokenizer.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    with _one_sentence(model):
        return AutoTokenizer.from_pretrained(
            resolve(model), revision=revision, trust_remote_code=trust_remote_code
        )


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: LoadProgress | None = None,
) -> PreTrainedModel:
    """The model in eval mode, with every weight taken from safetensors files.

    Args:
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for that of the checkpoint.
        device: a torch device, or `auto`: CUDA where there is one, else the CPU.
        progress: called as weights are read.

    Raises:
        CheckpointError: files are missing, truncated, corrupt or pickled; tensors are missing or of
            another shape.
        ConfigError: unknown dtype or device.
    """
    source = resolve(model)
    target = find_device(device)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    if Path(source).is_dir():
        check_files(Path(source))
    with _one_sentence(model), _counting(progress):
        loaded, info = model_class(config).from_pretrained(
            source,
            config=config,
            dtype=find_dtype(dtype) or "auto",
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{model!r} lacks {len(missing)} tensors that its configuration asks for, such as "
            f"{missing[0]}; the checkpoint is incomplete or of another model"
        )
    moved: PreTrainedModel = loaded.to(target).eval()
    return moved


def model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from, or the causal language model of its family."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def find_dtype(name: str) -> torch.dtype | None:
    """The torch dtype called `name`; None for `auto`.

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def find_device(name: str) -> torch.device:
    """The torch device called `name`; `auto` is CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for and there is no CUDA device; use cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu or cuda")
    return device


def context_length(config: Any) -> int | None:
    """Largest number of tokens that the model attends to, or None where its configuration does
    not say.
    """
    text = config.get_text_config()
    for name in _CONTEXT_ATTRIBUTES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_files(folder: Path) -> None:
    """Looks at every safetensors file that a checkpoint folder needs, before anything is loaded.

    Raises:
        CheckpointError: names the file that is missing, pickled, truncated or corrupt.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
        files = [folder / name for name in names]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{folder} lacks {len(absent)} of {len(files)} weight files, such as {absent[0]}"
            )
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        found = f"; {pickled[0].name} is a pickle, which is not read" if pickled else ""
        raise CheckpointError(f"{folder} holds no .safetensors weights{found}")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Compares a safetensors file's header with its length and its tensors' places.

    Raises:
        CheckpointError: the header is not one, or the file is shorter or longer than it says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{file} is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: item for name, item in header.items() if name != "__metadata__"}
            ends = [int(item["data_offsets"][1]) for item in tensors.values()]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} has a corrupt safetensors header") from error
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise CheckpointError(
            f"{file} has {size} bytes where its header asks for {expected}; it is "
            f"{'truncated' if size < expected else 'corrupt'}, download it again"
        )
    for name, item in tensors.items():
        _check_extent(file, name, item)


def _check_extent(file: Path, name: str, item: dict[str, Any]) -> None:
    width = _BYTES_OF.get(item.get("dtype", ""))
    start, end = item["data_offsets"]
    count = 1
    for length in item.get("shape", ()):
        count *= length
    if start > end or (width is not None and end - start != count * width):
        raise CheckpointError(f"{file}: tensor {name} does not have the bytes of its shape")


@contextmanager
def _one_sentence(model: str) -> Iterator[None]:
    """Turns what Transformers raises for a bad checkpoint into one sentence."""
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)  # its retries, one warning each
    try:
        yield
    except CheckpointError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{model!r} needs a package that is missing: {_first(error)}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        if "couldn't connect" in str(error) or "connection" in str(error).lower():
            raise CheckpointError(
                f"{model!r} is no local folder, not in the cache, and the hub cannot be reached; "
                "check the name or the network"
            ) from error
        raise CheckpointError(f"{model!r} cannot be loaded: {_first(error)}") from error
    finally:
        hub_logger.setLevel(level)


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _counting(progress: LoadProgress | None) -> Iterator[None]:
    """Passes Transformers' own count of loaded weights to `progress`, for the time of a load."""
    if progress is None:
        yield
        return

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") != "Loading weights":
            return factory(*args, **options)
        return _counted(args[0], progress)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _counted(items: Any, progress: LoadProgress) -> Iterator[Any]:
    total = len(items)
    for done, item in enumerate(items):
        progress(done, total)
        yield item
    progress(total, total)
