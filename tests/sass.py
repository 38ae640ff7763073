"""What a disassembler shows of compiled kernels: registers that Hopper's matrix instructions read
while others write them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Za-z0-9_.]+)(.*?);", re.MULTILINE)
_PRODUCT = re.compile(r"\s+R\d+, R(\d+), gdesc")
_NO_RESULT = ("ST", "BAR", "BRA", "HGMMA", "WARPGROUP", "SYNCS", "UTMA", "RED")


def disassembled(cubin: bytes, folder: Path) -> list[tuple[int, str, str]]:
    """Address, operation and operands of each instruction."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run(
        [tool, "--dump-sass", str(path)], check=True, capture_output=True, text=True
    )
    return [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(done.stdout)]


def _written(name: str, operands: str) -> set[int]:
    found = re.match(r"\s+R(\d+)", operands)
    if found is None or name.startswith(_NO_RESULT):
        return set()
    wide = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or "CS2R" in name else 1
    return set(range(int(found[1]), int(found[1]) + wide))


def _loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """Innermost loops with matrix instructions."""
    places = {at: i for i, (at, _, _) in enumerate(code)}
    loops = []
    for i, (at, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target is None or int(target[1], 16) >= at:
            continue
        body = code[places[int(target[1], 16)] : i + 1]
        if any(one[1].startswith("HGMMA") for one in body):
            loops.append(body)
    shortest = min((len(body) for body in loops), default=0)
    return [body for body in loops if len(body) < 2 * shortest]


def register_hazards(code: list[tuple[int, str, str]]) -> tuple[int, list[str]]:
    """How many products read registers in loops, and those whose registers are written before a
    wait that covers them.

    "DEPBAR.LE gsb0, n" waits until at most the n latest products are under way.
    """
    products, hazards = 0, []
    for body in _loops(code):
        for place, (at, _, operands) in enumerate(body):
            source = _PRODUCT.match(operands)
            if source is None:
                continue
            products += 1
            read = set(range(int(source[1]), int(source[1]) + 4))
            later, over = 0, False
            for _, name, after in body[place + 1 :] + body[: place + 1]:
                later += name.startswith("HGMMA")
                wait = re.search(r"gsb0, 0x([0-9a-f]+)", after) if "DEPBAR" in name else None
                over |= wait is not None and int(wait[1], 16) <= later
                if _written(name, after) & read:
                    if not over:
                        hazards.append(f"{at:#x} reads R{source[1]}, then {name}{after}")
                    break
    return products, hazards
