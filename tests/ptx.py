"""The few PTX instructions of the kernels' inline assembly, computed on a CPU from their
definitions in NVIDIA's PTX ISA."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
_WORD = 0xFFFFFFFF


def halves_of(register: Tensor, dtype: torch.dtype) -> Tensor:
    """Registers [N] as their two numbers of 16 bits [N, 2], low one first, in float64."""
    bits = torch.stack((register & 0xFFFF, register >> 16), dim=1)
    return bits.to(torch.uint16).view(dtype).double()


def _register_of(halves: Tensor, dtype: torch.dtype) -> Tensor:
    bits = halves.to(dtype).view(torch.uint16).long()
    return bits[:, 0] | (bits[:, 1] << 16)


def _permuted(low: Tensor, high: Tensor, selector: Tensor) -> Tensor:
    """prmt: byte i is the one that digit i of the selector names, of the eight of both."""
    both, out = torch.stack((low, high)), torch.zeros_like(low)
    for i in range(4):
        digit = int(selector[0] >> (4 * i)) & 0xF
        assert digit < 8, "replicated signs are not used"
        out |= ((both[digit // 4] >> (8 * (digit % 4))) & 0xFF) << (8 * i)
    return out


def _looked_up(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """lop3: any function of three bits; bit 4 a + 2 b + c of the table is its value."""
    out = torch.zeros_like(a)
    for place in range(8):
        if int(table[0]) >> place & 1:
            wanted = (place >> 2, place >> 1 & 1, place & 1)
            term = torch.full_like(a, _WORD)
            for bits, one in zip((a, b, c), wanted, strict=True):
                term &= bits if one else bits ^ _WORD
            out |= term
    return out


def run_assembly(text: str, words: Tensor, outputs: int) -> list[Tensor]:
    """The output registers of inline assembly whose one input is `words` (int64 [N], below 2^32).

    Raises:
        ValueError: for an instruction that is not known here.
    """
    registers = {f"${outputs}": words}

    def value(name: str) -> Tensor:
        if re.fullmatch(r"0x[0-9A-Fa-f]+|\d+", name):
            return torch.full_like(words, int(name, 0))
        return registers[name]

    for line in text.strip(" {}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, rest = line.split(maxsplit=1)
        target, *names = (part.strip() for part in rest.split(","))
        a, *others = (value(name) for name in names)
        if operation == "mov.b32":
            out = a
        elif operation == "prmt.b32":
            out = _permuted(a, *others)
        elif operation == "lop3.b32":
            out = _looked_up(a, *others)
        elif operation in ("shl.b32", "shr.b32"):
            out = (a << others[0]) & _WORD if operation == "shl.b32" else a >> others[0]
        elif operation in ("and.b32", "xor.b32"):
            out = a & others[0] if operation == "and.b32" else a ^ others[0]
        elif operation.startswith("fma.rn."):
            dtype = _HALVES[operation.removeprefix("fma.rn.")]
            x, y, z = (halves_of(part, dtype) for part in (a, *others))
            out = _register_of(x * y + z, dtype)
        else:
            raise ValueError(f"{operation} is not known here")
        registers[target] = out
    return [registers[f"${i}"] for i in range(outputs)]
