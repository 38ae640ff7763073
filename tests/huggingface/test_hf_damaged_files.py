"""Damaged files of checkpoints of every kind, each told in one line with its file."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    INDEX,
    WEIGHTS,
    edit_json,
    header_of,
    one_line,
    write_header,
)
from safetensors.torch import load_file, save_file

from moetor.errors import CheckpointError, MoetorError
from moetor.huggingface import checkpoint, loading


def _truncated(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])


def _truncated_to_half(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _truncated_in_header(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:100])


def _truncated_in_length(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x01\x02\x03")


def _empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def _too_long(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"more")


def _git_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    )


def _html(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<html><body>404 Not Found</body></html>" * 9)


def _header_no_json(folder: Path) -> None:
    write_header(folder / WEIGHTS, b'{"a": ', b"\0" * 8)


def _header_no_text(folder: Path) -> None:
    write_header(folder / WEIGHTS, b"\xff\xfe\xfd\xfc", b"\0" * 8)


def _header_deep(folder: Path) -> None:
    write_header(folder / WEIGHTS, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"\0" * 8)


def _with_entry(entry: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / WEIGHTS
        header, data = header_of(file)
        name = next(name for name in header if name != "__metadata__")
        header[name] = entry(header[name]) if callable(entry) else entry
        write_header(file, header, data)

    return damage


def _header_list(folder: Path) -> None:
    write_header(folder / WEIGHTS, ["a", "b"], b"\0" * 8)


def _header_nothing(folder: Path) -> None:
    write_header(folder / WEIGHTS, {}, b"")


def _weights_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@dataclass(frozen=True)
class Damage:
    id: str
    apply: Callable[[Path], None]
    text: str = ""


F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = (
    Damage("truncated", _truncated, "truncated"),
    Damage("half", _truncated_to_half, "truncated"),
    Damage("in-header", _truncated_in_header, "truncated"),
    Damage("in-length", _truncated_in_length, "truncated"),
    Damage("empty", _empty, "truncated"),
    Damage("too-long", _too_long, "corrupt"),
    Damage("git-pointer", _git_pointer),
    Damage("html", _html),
    Damage("header-no-json", _header_no_json, "corrupt"),
    Damage("header-no-text", _header_no_text, "corrupt"),
    Damage("header-deep", _header_deep, "corrupt"),
    Damage("header-list", _header_list, "corrupt"),
    Damage("entry-number", _with_entry(3), "corrupt"),
    Damage("entry-null", _with_entry(None), "corrupt"),
    Damage("entry-empty", _with_entry({}), "corrupt"),
    Damage("offsets-missing", _with_entry({"dtype": "F32", "shape": [2]}), "corrupt"),
    Damage("offsets-short", _with_entry(lambda e: e | {"data_offsets": [0]}), "corrupt"),
    Damage("offsets-long", _with_entry(lambda e: e | {"data_offsets": [0, 8, 16]})),
    Damage("offsets-text", _with_entry(lambda e: e | {"data_offsets": ["0", "8"]})),
    Damage("offsets-negative", _with_entry(lambda e: e | {"data_offsets": [-8, 0]})),
    Damage("offsets-float", _with_entry(lambda e: e | {"data_offsets": [0.5, 8.5]})),
    Damage("offsets-swapped", _with_entry(lambda e: e | {"data_offsets": e["data_offsets"][::-1]})),
    Damage("shape-text", _with_entry(lambda e: e | {"shape": "2x3"})),
    Damage("shape-of-texts", _with_entry(lambda e: e | {"shape": ["2", "3"]})),
    Damage("shape-null", _with_entry(lambda e: e | {"shape": None})),
    Damage("shape-negative", _with_entry(lambda e: e | {"shape": [-2, -3]})),
    Damage("shape-larger", _with_entry(lambda e: e | {"shape": [*e["shape"], 2]})),
    Damage("dtype-unknown", _with_entry(lambda e: e | {"dtype": "Q7"})),
    Damage("dtype-missing", _with_entry(lambda e: {k: v for k, v in e.items() if k != "dtype"})),
    Damage("dtype-list", _with_entry(lambda e: e | {"dtype": ["F32"]})),
    Damage("dtype-other", _with_entry(lambda e: e | {"dtype": "F16"})),
    Damage("folder", _weights_folder),
    Damage("none", _no_weights, "no .safetensors weights"),
    Damage("pickled", _pickled, "pytorch_model.bin is a pickle"),
)


@pytest.mark.parametrize("damage", BAD_FILES, ids=lambda damage: damage.id)
def test_bad_weights_file(damage: Damage, whole: Path) -> None:
    damage.apply(whole)
    with pytest.raises(CheckpointError) as caught:
        loading.load_model(str(whole))
    assert str(whole) in one_line(caught.value)
    assert damage.text in str(caught.value)


def test_no_tensors_at_all(whole: Path) -> None:
    _header_nothing(whole)
    with pytest.raises(CheckpointError, match="lacks") as caught:
        loading.load_model(str(whole))
    one_line(caught.value)


def test_truncated_anywhere(whole: Path) -> None:
    """At forty lengths, none of which loads."""
    file = whole / WEIGHTS
    raw = file.read_bytes()
    generator = random.Random(0)
    for length in (*range(12), *(generator.randrange(len(raw)) for _ in range(30))):
        file.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"truncated|corrupt") as caught:
            checkpoint.check_safetensors(file)
        assert str(file) in one_line(caught.value)


def test_header_with_one_wrong_byte(whole: Path) -> None:
    """Refused, or taken where the byte is a letter of a name: never another error."""
    file = whole / WEIGHTS
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    generator = random.Random(1)
    refused = 0
    for _ in range(300):
        place = generator.randrange(8 + length)
        changed = bytearray(raw)
        changed[place] = generator.randrange(256)
        file.write_bytes(bytes(changed))
        try:
            checkpoint.check_safetensors(file)
        except CheckpointError as error:
            refused += 1
            one_line(error)
    assert refused > 30


def test_missing_tensor(whole: Path) -> None:
    file = whole / WEIGHTS
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor.*q_proj\.weight") as caught:
        loading.load_model(str(whole))
    assert str(whole) in one_line(caught.value)


def test_one_expert_missing(whole: Path) -> None:
    """The experts are saved one by one: a gap may not be filled with random numbers."""
    file = whole / WEIGHTS
    tensors = load_file(file)
    gone = [name for name in tensors if ".experts.5." in name]
    assert gone
    for name in gone:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        loading.load_model(str(whole))
    assert str(whole) in one_line(caught.value)


def test_wrong_shape(whole: Path) -> None:
    file = whole / WEIGHTS
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name][:-2].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="q_proj") as caught:
        loading.load_model(str(whole))
    assert str(whole) in one_line(caught.value)


def test_config_of_another_size(whole: Path) -> None:
    edit_json(whole / "config.json", lambda c: c.update(moe_intermediate_size=32))
    with pytest.raises(CheckpointError) as caught:
        loading.load_model(str(whole))
    assert str(whole) in one_line(caught.value)


def test_missing_shard(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=re.escape(gone.name)) as caught:
        loading.load_model(str(shards))
    assert str(shards) in one_line(caught.value)


def test_truncated_shard(shards: Path) -> None:
    cut = sorted(shards.glob("*.safetensors"))[-1]
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(cut))}.*truncated") as caught:
        loading.load_model(str(shards))
    one_line(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "{}",
        "[]",
        "3",
        '{"weight_map": []}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "x", "b": 5}}',
    ],
)
def test_bad_index(content: str, shards: Path) -> None:
    (shards / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(INDEX)) as caught:
        loading.load_model(str(shards))
    assert str(shards) in one_line(caught.value)


def test_index_that_lists_nothing(shards: Path) -> None:
    (shards / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError) as caught:
        loading.load_model(str(shards))
    assert str(shards) in one_line(caught.value)


def test_nothing_is_written(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    loading.load_model(str(whole))
    _truncated(whole)
    before[whole / WEIGHTS] = (whole / WEIGHTS).stat().st_mtime_ns
    with pytest.raises(MoetorError):
        loading.load_model(str(whole))
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
