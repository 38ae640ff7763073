"""Reading a quantised checkpoint: codes of experts straight into their buffers, everything else as
numbers.

Shape letters: E experts, H hidden, I intermediate, J rows of the first product, N outputs of a
product, D its depth.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from moetor.config import ExpertsConfig
from moetor.errors import CheckpointError, InputError, UnsupportedError
from moetor.huggingface.checkpoint import CheckpointReader
from moetor.huggingface.experts_form import UP_NAMES
from moetor.huggingface.layout import Layout, Piece
from moetor.huggingface.load_steps import LoadPlan, Streamed
from moetor.huggingface.packed_tensors import PackedTensor
from moetor.huggingface.quantized_checkpoint import QuantizedCheckpoint
from moetor.huggingface.quantized_loading import quantizable_experts
from moetor.huggingface.streaming import PlainSink, stand_in
from moetor.kernels.dequantize import dequantize_expert
from moetor.kernels.formats import (
    ActivationFormat,
    QuantizedExpertWeights,
    QuantizedMatrix,
    WeightFormat,
)
from moetor.quantization.quantize import Codes, empty_matrix, put_expert


class QuantizedReader(CheckpointReader):
    """Reads the tensors that a `QuantizedCheckpoint` lists."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        super().__init__(checkpoint)
        self.packed = checkpoint.packed
        self._stored = checkpoint.open()

    def read(self, name: str, box: tuple[slice, ...] = ()) -> Tensor:
        """As of a `CheckpointReader`; a quantised matrix as numbers in float32."""
        matrix = self.packed.get(name)
        if matrix is None:
            return self._stored.read(name, box)
        numbers = [
            _dequantised(matrix, self.codes(matrix, expert))
            for expert in ([None] if matrix.experts is None else range(matrix.experts))
        ]
        whole = numbers[0] if matrix.experts is None else torch.stack(numbers)
        return whole[box] if box else whole

    def codes(self, matrix: PackedTensor, expert: int | None) -> Codes:
        """One matrix in our format.

        Raises:
            CheckpointError: it cannot be used; names the tensor.
        """
        return matrix.codes(self._part, expert)

    def input_scale(self, matrix: PackedTensor, expert: int | None) -> float | None:
        """The static scale of the matrix's input."""
        if matrix.input_scale is None:
            return None
        value = float(self._part(matrix.input_scale, expert).flatten()[0])
        if not 0 < value < math.inf:
            raise CheckpointError(f"tensor {matrix.input_scale} is {value}, no scale")
        return value

    def _part(self, name: str, expert: int | None) -> Tensor:
        if expert is None:
            return self._stored.read(name).clone()
        return self._stored.read(name, (slice(expert, expert + 1),))[0].clone()

    def close(self) -> None:
        """See `CheckpointReader.close`."""
        self._stored.close()


def _dequantised(matrix: PackedTensor, codes: Codes) -> Tensor:
    """[N, D], or [D, N] where the model has it so."""
    parts = {
        name: None if part is None else part[None]
        for name, part in (
            ("zero_points", codes.zero_points),
            ("row_scales", codes.row_scales),
        )
    }
    one = QuantizedMatrix(
        format=matrix.kind,
        depth=matrix.depth,
        values=codes.values[None],
        scales=codes.scales[None],
        **parts,
    )
    numbers = dequantize_expert(one, 0)
    return numbers.T if matrix.transposed else numbers


@dataclass(slots=True)
class _Product:
    """One product of an experts module on its way."""

    kind: WeightFormat
    experts: int
    rows: int
    depth: int
    matrix: QuantizedMatrix | None = None
    missing: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


def packed_experts(
    model: nn.Module, plan: LoadPlan, checkpoint: QuantizedCheckpoint
) -> dict[str, ExpertsConfig]:
    """Forms of the experts modules all of whose weights are quantised in the checkpoint, by path.

    Raises:
        CheckpointError: some of a module's experts are quantised and some are not, or otherwise.
    """
    forms = quantizable_experts(model, plan)
    items = {item.name: item for item in plan.streamed}
    kept: dict[str, ExpertsConfig] = {}
    for path, form in forms.items():
        up = "gate_up_proj" if form.gated else "up_proj"
        kinds = []
        for name in (up, "down_proj"):
            found = [checkpoint.packed.get(key) for key in items[f"{path}.{name}"].layout.keys]
            kinds.append({None if one is None else one.kind for one in found})
        if all(kind == {None} for kind in kinds):
            continue
        if any(len(kind) > 1 for kind in kinds) or {None} in kinds:
            raise CheckpointError(
                f"{checkpoint.folder}: the experts of {path!r} are quantised in several ways, or "
                "only some of them are"
            )
        kept[path] = form
    return kept


class PackedSink(PlainSink):
    """Puts the codes of the experts of `forms` into their buffers; the rest is as in `PlainSink`.

    Args:
        forms: by path of the experts module.
        activations: activation format of all of them.
        host: as for `PlainSink`.
    """

    def __init__(
        self,
        shapes: Mapping[str, Tensor],
        device: torch.device,
        forms: Mapping[str, ExpertsConfig],
        activations: str,
        host: Collection[str] = (),
    ) -> None:
        super().__init__(shapes, device, host)
        self._forms = forms
        self._activations = cast(ActivationFormat, activations)
        self._products: dict[str, _Product] = {}
        self._placeholders: dict[str, Tensor] = {}
        self._products_lock = threading.Lock()

    def takes(
        self, item: Streamed, expert: int | None, layout: Layout, reader: CheckpointReader
    ) -> bool:
        """Reads one expert's codes.

        Raises:
            CheckpointError: they do not fit; names the tensor.
        """
        path, _, name = item.name.rpartition(".")
        form = self._forms.get(path)
        if form is None or name not in (*UP_NAMES, "down_proj"):
            return False
        assert isinstance(reader, QuantizedReader), "the checkpoint is quantised"
        assert expert is not None, "packed experts have three dimensions"
        product = self._product(item, form, layout, reader.packed)
        codes, scale = _assemble(product, form, name, layout, reader)
        with product.lock:
            if product.matrix is None:
                product.matrix = empty_matrix(
                    product.kind,
                    product.experts,
                    product.rows,
                    product.depth,
                    device="cpu" if self.stays_on_host(item.name) else self._device,
                    scale_dtype=codes.scales.dtype,
                    static=scale is not None,
                )
        try:
            put_expert(product.matrix, expert, codes)
        except InputError as error:
            raise CheckpointError(f"{layout.keys[0]}: {error}") from error
        if product.matrix.input_scales is not None and scale is not None:
            product.matrix.input_scales[expert] = scale
        product.missing.discard(expert)
        return True

    def _product(
        self,
        item: Streamed,
        form: ExpertsConfig,
        layout: Layout,
        packed: Mapping[str, PackedTensor],
    ) -> _Product:
        with self._products_lock:
            if item.name not in self._products:
                up = not item.name.endswith(".down_proj")
                kind = _joined_kind(packed[layout.keys[0]].kind, form, layout)
                self._products[item.name] = _Product(
                    kind,
                    form.num_experts,
                    form.up_size if up else form.hidden_size,
                    form.hidden_size if up else form.intermediate_size,
                    missing=set(range(form.num_experts)),
                )
                shape = self._shapes[item.name].shape
                self._placeholders[item.name] = stand_in(shape, item.dtype, self._device)
            return self._products[item.name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The finished tensors; for codes one that has the weights' shape and no memory."""
        yield from super().tensors()
        yield from self._placeholders.items()

    def quantized(self) -> dict[str, QuantizedExpertWeights]:
        """The experts by path of their module, without biases and norms."""
        made: dict[str, QuantizedExpertWeights] = {}
        for path, form in self._forms.items():
            up = self._products[f"{path}.{'gate_up_proj' if form.gated else 'up_proj'}"]
            down = self._products[f"{path}.down_proj"]
            assert not up.missing | down.missing, "every expert has been read"
            assert up.matrix is not None, "there is an expert"
            assert down.matrix is not None, "there is an expert"
            made[path] = QuantizedExpertWeights(
                gate_up=up.matrix, down=down.matrix, activation_format=self._activations
            )
        return made


def _out_axis(form: ExpertsConfig) -> int:
    return 2 if form.transposed else 1


def _joined_kind(kind: WeightFormat, form: ExpertsConfig, layout: Layout) -> WeightFormat:
    """The format of a matrix joined from several: blocks of rows must not straddle two of them."""
    rows, depth = kind.group
    if rows <= 1:
        return kind
    starts = (piece.spans[_out_axis(form)].start for piece in layout.pieces)
    common = math.gcd(rows, *starts)
    return WeightFormat(element=kind.element, group=(common, depth))


def _assemble(
    product: _Product, form: ExpertsConfig, name: str, layout: Layout, reader: QuantizedReader
) -> tuple[Codes, float | None]:
    """One expert's codes in canonical row order, from one matrix or from gate and up; and the
    largest of their inputs' static scales, which saturates for neither."""
    parts: list[tuple[Tensor, Codes]] = []
    scales: list[float] = []
    for piece in layout.pieces:
        matrix = reader.packed[piece.key]
        expert = piece.spans[0].offset if matrix.experts is not None else None
        rows, target = _rows(piece, matrix, form)
        codes = reader.codes(matrix, expert)
        if form.interleaved and name != "down_proj":
            target = target // 2 + (target % 2) * form.intermediate_size
        parts.append((target, _selected(codes, rows, matrix.kind, product.kind)))
        scale = reader.input_scale(matrix, expert)
        scales += [] if scale is None else [scale]
    return _joined(parts, product.kind), max(scales, default=None)


def _rows(piece: Piece, matrix: PackedTensor, form: ExpertsConfig) -> tuple[Tensor, Tensor]:
    """Which rows of the stored matrix go to which rows of the model's."""
    out, inner = piece.spans[_out_axis(form)], piece.spans[3 - _out_axis(form)]
    rank = len(matrix.shape)
    axes = (rank - 1, rank - 2) if matrix.transposed else (rank - 2, rank - 1)
    whole = (inner.start, inner.size, inner.offset, inner.step) == (0, matrix.depth, 0, 1)
    if (out.source, inner.source) != axes or not whole:
        raise UnsupportedError(
            f"tensor {piece.key} is quantised, and the model needs a part of its depth or has it "
            "the other way round, which would cut groups"
        )
    places = torch.arange(out.size)
    return out.offset + places * out.step, out.start + places * out.stride


def _selected(codes: Codes, rows: Tensor, kind: WeightFormat, joined: WeightFormat) -> Codes:
    if kind.group[0] > 1:
        scales = codes.scales
        repeat = kind.group[0] // joined.group[0]
        if repeat > 1:
            count = -(-codes.values.shape[0] // joined.group[0])
            scales = scales.repeat_interleave(repeat, 0)[:count]
        if not torch.equal(rows, torch.arange(codes.values.shape[0])):
            raise UnsupportedError("blocks of rows cannot be taken apart")
        return Codes(values=codes.values, scales=scales)
    if torch.equal(rows, torch.arange(codes.values.shape[0])):
        return codes

    def pick(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        # float8 has no indexing of its own on every device; its bytes do.
        flat = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        return flat[rows].view(tensor.dtype)

    values, scales_ = pick(codes.values), pick(codes.scales)
    assert values is not None, "there are values"
    assert scales_ is not None, "there are scales"
    return Codes(
        values=values,
        scales=scales_,
        zero_points=pick(codes.zero_points),
        row_scales=pick(codes.row_scales),
    )


def _joined(parts: list[tuple[Tensor, Codes]], kind: WeightFormat) -> Codes:
    targets = torch.cat([target for target, _ in parts])
    order = targets.argsort()
    straight = torch.equal(order, torch.arange(len(order)))

    def join(name: str) -> Tensor | None:
        tensors = [getattr(codes, name) for _, codes in parts]
        if tensors[0] is None:
            return None
        dtype = tensors[0].dtype
        as_bytes = [t.view(torch.uint8) if t.itemsize == 1 else t for t in tensors]
        whole = as_bytes[0] if len(as_bytes) == 1 else torch.cat(as_bytes)
        return (whole if straight else whole[order]).view(dtype)

    if kind.group[0] > 1 and not straight:
        raise UnsupportedError("rows of gate and up that alternate cannot be in blocks")
    values, scales = join("values"), join("scales")
    assert values is not None, "there are values"
    assert scales is not None, "there are scales"
    return Codes(
        values=values,
        scales=scales,
        zero_points=join("zero_points"),
        row_scales=join("row_scales"),
    )
