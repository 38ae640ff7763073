"""A checkpoint on disk: its files, their headers checked before a weight is read, and boxes of its
tensors, read without holding more of a file in memory than is asked for.
"""

from __future__ import annotations

import json
import math
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moetor.errors import CheckpointError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of a file, to tell revisions apart: as many small reads as take no time.
_SAMPLES, _SAMPLE_BYTES = 256, 64
_BYTES_OF = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LINE = 200
# A mapped file counts as memory of this process as far as it was read: it is closed and opened
# anew after this many bytes, or after so many times its header, which every opening reads.
WINDOW_BYTES = 8 * 2**20
_HEADERS_PER_WINDOW = 64


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors header.

    Attributes:
        dtype: as the format writes it, such as BF16.
        start, end: its bytes, counted from the end of the header.
    """

    name: str
    file: Path = Path()
    dtype: str = ""
    shape: tuple[int, ...] = ()
    start: int = 0
    end: int = 0

    @classmethod
    def read(cls, name: str, item: Any) -> StoredTensor:
        """Raises one of Python's own errors where the entry is none."""
        if name == "__metadata__":
            return cls(name)
        (start, end), shape = item["data_offsets"], tuple(item["shape"])
        if not all(isinstance(number, int) and number >= 0 for number in (start, end, *shape)):
            raise ValueError(f"{name} has sizes that are no sizes")
        if not isinstance(item["dtype"], str):
            raise TypeError(f"{name} has a dtype that is no name")
        return cls(name, Path(), item["dtype"], shape, start, end)

    @property
    def fits(self) -> bool:
        """Whether its bytes are those of its shape."""
        width = _BYTES_OF.get(self.dtype)
        return self.nbytes >= 0 and (width is None or self.nbytes == width * math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The floating dtype; None for integers and for formats of quantised weights."""
        return _DTYPES.get(self.dtype)


class Checkpoint:
    """The tensors of a folder's safetensors files, by name.

    Raises:
        CheckpointError: names the file that is missing, pickled, truncated or corrupt, or the
            tensor that two files hold.
    """

    def __init__(self, folder: Path, *, file_name: str | None = None) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for file in weight_files(folder, file_name):
            for name, tensor in check_safetensors(file).items():
                twin = self.tensors.get(name)
                if twin is not None:
                    raise CheckpointError(
                        f"tensor {name} is in two files: {twin.file} and {tensor.file.name}"
                    )
                self.tensors[name] = tensor

    @property
    def nbytes(self) -> int:
        """Size of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def files_of(self, names: Iterable[str]) -> str:
        """The files that hold these tensors, for an error."""
        files = dict.fromkeys(self.tensors[name].file for name in names if name in self.tensors)
        return ", ".join(str(file) for file in files) or str(self.folder)

    def sampled(self) -> dict[str, int]:
        """A checksum of some bytes of every file: another revision shows in it, unless it differs
        in few places.
        """
        return {
            path.name: _sampled(path)
            for path in sorted({tensor.file for tensor in self.tensors.values()})
        }

    def float_dtype(self) -> torch.dtype | None:
        """The dtype of the first tensor with a floating one."""
        found = (tensor.torch_dtype for tensor in self.tensors.values())
        return next((dtype for dtype in found if dtype is not None), None)


def _sampled(path: Path) -> int:
    size, told = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file:
        for place in range(_SAMPLES):
            file.seek(size * place // _SAMPLES)
            told = zlib.crc32(file.read(_SAMPLE_BYTES), told)
    return told


class CheckpointReader:
    """Reads boxes of a checkpoint's tensors; may be called by several threads.

    What it returns is a view of a mapped file: it is to be copied and let go.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._local = threading.local()

    def read(self, name: str, box: tuple[slice, ...] = ()) -> Tensor:
        """A box of a tensor, or with `()` all of it."""
        tensor = self.checkpoint.tensors[name]
        part = math.prod(
            (len(range(*cut.indices(size))) / max(1, size))
            for cut, size in zip(box, tensor.shape, strict=False)
        )
        handle = self._handle(tensor.file, int(tensor.nbytes * part))
        if not tensor.shape or not box:
            whole: Tensor = handle.get_tensor(name)
            return whole
        found: Tensor = handle.get_slice(name)[box]
        return found

    def close(self) -> None:
        """Lets this thread's files go."""
        self._local.__dict__.clear()

    def _handle(self, file: Path, nbytes: int) -> Any:
        open_files: dict[Path, _OpenFile] = self._local.__dict__.setdefault("files", {})
        found = open_files.get(file)
        if found is None or (found.read and found.read + nbytes > found.window):
            open_files.clear()  # the other files' windows count, too
            found = open_files[file] = _OpenFile(file)
        found.read += nbytes
        return found.handle


class _OpenFile:
    """A mapped file, and how much of it was read."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            header = struct.unpack("<Q", stream.read(8))[0]
        self.handle = safe_open(file, "pt")
        self.window = max(WINDOW_BYTES, _HEADERS_PER_WINDOW * header)
        self.read = 0


def weight_files(folder: Path, file_name: str | None = None) -> list[Path]:
    """The files that make up a checkpoint: `file_name`, or the ones that Transformers would take.

    Raises:
        CheckpointError: names the file that is missing or pickled.
    """
    whole, index = folder / (file_name or WHOLE), folder / INDEX
    if whole.exists() or file_name is not None:
        return [whole]
    if index.is_file():
        return _indexed_files(index)
    others = sorted(folder.glob("*.safetensors"))
    pickled = [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pt*"))]
    found = f"; {pickled[0].name} is a pickle, which is not read" if pickled else ""
    if others:
        found = f"; {others[0].name} is neither {WHOLE} nor listed in a {INDEX}"
    raise CheckpointError(f"{folder} holds no .safetensors weights{found}")


def _indexed_files(index: Path) -> list[Path]:
    folder = index.parent
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {first_line(error)}") from error
    if not files:
        raise CheckpointError(f"{index} lists no weights")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(files)} weight files, such as {absent[0]}"
        )
    return files


def check_safetensors(file: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a safetensors file, whose header is compared with its length.

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
        entries = [StoredTensor.read(*item) for item in json.loads(text).items()]
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
    return {entry.name: replace(entry, file=file) for entry in tensors}


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else " ".join(lines[:2])
    return text.rstrip(".:") if len(text) <= _LINE else text[:_LINE] + " ..."
