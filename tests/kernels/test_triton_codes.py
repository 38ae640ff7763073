"""Codes to numbers in Triton: every code of every element under Triton's interpreter (this file as
a script), and the hand-written instructions computed one by one, and compiled for two generations
of GPUs.

`tests/gpu/test_large_quantized_cuda.py` runs them on one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))

from interpreted import needs_triton, run_interpreted  # noqa: E402
from ptx import halves_of, run_assembly  # noqa: E402

COMPILED = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from kernels.code_kernels import write_halves, write_numbers

for capability in (80, 90):
    target = GPUTarget("cuda", capability, 32)
    for element, offset in (("int4", 0), ("int4", 8), ("e2m1", 0), ("int8", 0), ("e4m3", 0)):
        packed = element in ("int4", "e2m1")
        for name, dtype in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
            signature = {"codes": "*u8", "low": f"*{name}"}
            constants = {"ELEMENT": element, "DTYPE": dtype, "SIZE": 1024}
            if packed:
                signature["high"] = f"*{name}"
                constants["OFFSET"] = offset
            signature |= dict.fromkeys(constants, "constexpr")
            source = triton.compiler.ASTSource(
                write_halves if packed else write_numbers, signature, constants
            )
            made = triton.compile(source, target=target)
            assert "fma.rn" in made.asm["ptx"], (element, name)
"""


@needs_triton
def test_under_the_interpreter() -> None:
    run_interpreted(HERE)


@needs_triton
def test_the_instructions_give_every_code_its_number() -> None:
    from kernels.code_kernels import expected_codes
    from moetor.kernels.triton import quantized_code

    # Every code in every one of the four bytes, beside others.
    codes = (torch.arange(256)[:, None] * torch.tensor([1, 7, 13, 29]) + torch.arange(4)) % 256
    words = (codes << torch.tensor([0, 8, 16, 24])).sum(dim=1)
    for name, element, offset in (
        ("INT4_BF16", "int4", 0), ("INT4_BF16_8", "int4", 8), ("INT4_FP16", "int4", 0),
        ("INT4_FP16_8", "int4", 8), ("E2M1_BF16", "e2m1", 0), ("E2M1_FP16", "e2m1", 0),
        ("E4M3_BF16", "e4m3", 0), ("E4M3_FP16", "e4m3", 0), ("INT8_BF16", "int8", 0),
        ("INT8_FP16", "int8", 0), ("E2M1_BITS", "e2m1", 0), ("E4M3_BITS", "e4m3", 0),
    ):  # fmt: skip
        packed = element in ("int4", "e2m1")
        dtype = torch.float16 if "FP16" in name else torch.bfloat16
        text = getattr(quantized_code, name).value
        made = [halves_of(one, dtype) for one in run_assembly(text, words, 4 if packed else 2)]
        numbers = expected_codes(element, offset)
        if "BITS" in name:
            numbers = numbers * 2.0 ** (-126 if packed else -120)
        first = torch.cat(made[:2], dim=1)
        assert torch.equal(first, numbers[codes & 15 if packed else codes]), name
        if packed:
            assert torch.equal(torch.cat(made[2:], dim=1), numbers[codes >> 4]), name


@needs_triton
def test_the_instructions_compile() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# --- what runs in a process of its own -----------------------------------------------------------


def _main() -> None:
    import triton.language as tl

    from kernels.code_kernels import expected_codes, write_halves, write_numbers, write_scales
    from moetor.kernels.dequantize import unpack_nibbles

    codes = torch.arange(256, dtype=torch.uint8)
    for dtype, name in (
        (torch.float32, tl.float32), (torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)
    ):  # fmt: skip
        for element in ("int8", "e4m3"):
            made = torch.full((256,), float("nan"), dtype=dtype)
            write_numbers[(1,)](codes, made, element, name, 256)
            assert torch.equal(made.double(), expected_codes(element, 0)[codes.long()]), element
        for element, offset in (("int4", 0), ("int4", 8), ("e2m1", 0)):
            low, high = torch.full((2, 256), float("nan"), dtype=dtype)
            write_halves[(1,)](codes, low, high, element, offset, name, 256)
            numbers = expected_codes(element, offset)
            # In 16 bytes: sixteen low halves, then sixteen high ones.
            wanted = numbers[unpack_nibbles(codes).long()].view(-1, 2, 16)
            assert torch.equal(low.double().view(-1, 16), wanted[:, 0]), element
            assert torch.equal(high.double().view(-1, 16), wanted[:, 1]), element
    made = torch.full((256,), float("nan"))
    write_scales[(1,)](codes, made, "e8m0", 256)
    assert made[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    write_scales[(1,)](codes, made, "e4m3", 256)
    assert torch.equal(made.double(), expected_codes("e4m3", 0))
    floats = torch.randn(256).bfloat16()
    write_scales[(1,)](floats, made, "float", 256)
    assert torch.equal(made, floats.float())
    _check_places()


def _check_places() -> None:
    import triton.language as tl

    from kernels.code_kernels import write_places, write_scaled

    low = torch.empty(64, dtype=torch.int32)
    write_places[(1,)](low, 64)
    assert low.tolist() == [32 * (byte // 16) + byte % 16 for byte in range(64)]
    numbers, scales = torch.randn(4, 64), torch.rand(4, 4)
    made = torch.full_like(numbers, float("nan"))
    write_scaled[(1,)](numbers, scales, made, 4, 64, 16, tl.float32)
    assert torch.equal(made, numbers * scales.repeat_interleave(16, 1))


if __name__ == "__main__":
    _main()
