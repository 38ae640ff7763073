"""From a path, a hub id or `demo` to a configuration, a tokenizer and a model; every failure is
one sentence.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moetor.demo import model_path
from moetor.errors import CheckpointError, ConfigError, MoetorError

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
_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "tekken.json")
_BYTES_OF = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_LINE = 200
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


def load_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        CheckpointError: it cannot be found or read, or asks for more experts per token than it has.
    """
    with _one_sentence(model):
        config = AutoConfig.from_pretrained(
            resolve(model), revision=revision, trust_remote_code=trust_remote_code
        )
        sizes = config.get_text_config().to_dict()
    experts, top_k = (_stated(sizes, names) for names in (_EXPERTS_NAMES, _TOP_K_NAMES))
    # One expert or none is how some families say that they are dense.
    if 1 < experts < top_k:
        raise CheckpointError(
            f"the config of {model!r} asks for {top_k} experts per token and has {experts}"
        )
    return config


def _stated(sizes: dict[str, Any], names: tuple[str, ...]) -> int:
    found = (sizes.get(name) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)


def load_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The model's tokenizer.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    source = resolve(model)
    absent = CheckpointError(f"{model!r} holds no tokenizer, such as a tokenizer.json")
    folder = Path(source)
    if folder.is_dir() and not any(next(folder.glob(one), None) for one in _TOKENIZER_FILES):
        raise absent
    with _one_sentence(model):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    # Without its vocabulary, some classes make a tokenizer that turns every text into nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise absent
    return tokenizer


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
    target, wanted = find_device(device), find_dtype(dtype) or "auto"
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    if Path(source).is_dir():
        check_files(Path(source))
    with _one_sentence(model), _counting(progress):
        loaded, info = model_class(config).from_pretrained(
            source,
            config=config,
            dtype=wanted,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    for name, found, asked in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{model!r} has tensor {name} of shape {tuple(found)} where its configuration asks for "
            f"{tuple(asked)}"
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
            files = [folder / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{index} is not a safetensors index: {first_line(error)}"
            ) from error
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
    if not file.is_file():
        raise CheckpointError(f"{file} is no file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{file} is truncated or no safetensors file ({size} bytes)")
        text = stream.read(length)
    try:
        entries = [_Entry.read(*item) for item in json.loads(text).items()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a corrupt safetensors header") from error
    tensors = [entry for entry in entries if entry.name != "__metadata__"]
    expected = 8 + length + max((entry.end for entry in tensors), default=0)
    if expected != size:
        raise CheckpointError(
            f"{file} has {size} bytes where its header asks for {expected}; it is "
            f"{'truncated' if size < expected else 'corrupt'}, download it again"
        )
    for entry in tensors:
        if not entry.fits:
            raise CheckpointError(
                f"{file}: tensor {entry.name} does not have the bytes of its shape"
            )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a safetensors header."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    start: int = 0
    end: int = 0

    @classmethod
    def read(cls, name: str, item: Any) -> _Entry:
        """Raises one of Python's own errors where the entry is none."""
        if name == "__metadata__":
            return cls(name)
        (start, end), shape = item["data_offsets"], tuple(item["shape"])
        if not all(isinstance(number, int) and number >= 0 for number in (start, end, *shape)):
            raise ValueError(f"{name} has sizes that are no sizes")
        if not isinstance(item["dtype"], str):
            raise TypeError(f"{name} has a dtype that is no name")
        return cls(name, item["dtype"], shape, start, end)

    @property
    def fits(self) -> bool:
        """Whether its bytes are those of its shape."""
        width = _BYTES_OF.get(self.dtype)
        bytes_there = self.end - self.start
        return bytes_there >= 0 and (width is None or bytes_there == width * math.prod(self.shape))


@contextmanager
def _one_sentence(model: str) -> Iterator[None]:
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


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else " ".join(lines[:2])
    return text.rstrip(".:") if len(text) <= _LINE else text[:_LINE] + " ..."


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
