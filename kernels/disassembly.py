"""Compiles a kernel for an absent GPU and counts the instructions of its disassembly.

The counts are exact and repeatable for one Triton release. They say nothing about time.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedbert_kernels.compile_case import CompileCase

TENSOR_CORE = re.compile(r"^(HGMMA|HMMA|IMMA|QGMMA|BGMMA|UTC\w*MMA)")
CLASSES = (
    ("tensor", TENSOR_CORE),
    ("special", re.compile(r"^MUFU")),
    ("wide multiply", re.compile(r"^(IMAD\.WIDE|IMAD\.HI)")),
    ("local memory", re.compile(r"^(LDL|STL)")),
    ("memory", re.compile(r"^(LD|ST|ATOM|RED|UTMA|UBLKCP|UBLKRED|TLD|MATCH|CCTL)")),
    ("float", re.compile(r"^(F|HADD|HMUL|HFMA|HMNMX|HSET|I2F|F2)")),
    ("integer", re.compile(r"^(I|LOP|PLOP|SHF|SEL|PRMT|LEA|VIADD|VIMNMX|BFE|BFI|BREV|FLO|POPC|SGXT|MOV|R2P|P2R|CS2R)")),
    ("uniform", re.compile(r"^(U|R2U|S2U)")),
)
"""Instruction classes, first match wins; the rest (barriers, branches, waits) is "control"."""

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*;?\s*$")
INSTRUCTION_BYTES = 16

Code = list[tuple[str, int | None]]
"""(opcode, index of the instruction that its last operand addresses) of each instruction."""


def measure(cases: Sequence[CompileCase], architecture: int) -> list[dict[str, Any]]:
    """Registers, spills, shared memory, tensor-core instructions and main loop of each case.

    {"error": ...} for a case that does not compile. Takes several cases: the disassembler starts
    more slowly than it runs.
    """
    rows: list[dict[str, Any]] = []
    texts: list[bytes] = []
    for case in cases:
        try:
            compiled = compile_without_gpu(case, architecture)
        except Exception as error:  # Any compiler error becomes a failing row.
            rows.append({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})
            continue
        cubin = compiled.asm["cubin"]
        texts.append(_text_section(cubin))
        rows.append({"registers": _registers(cubin), "shared": compiled.metadata.shared})
    codes = iter(_disassemble(texts, architecture))
    return [row if "error" in row else _counts(row, next(codes)) for row in rows]


def _counts(row: dict[str, Any], code: Code) -> dict[str, Any]:
    return {
        "registers": row["registers"],
        "spills": sum(_class(opcode) == "local memory" for opcode, _ in code),
        "shared": row["shared"],
        "tensor": dict(sorted(_tensor_instructions(code).items())),
        "loop": dict(sorted(Counter(_class(opcode) for opcode, _ in _main_loop(code)).items())),
    }


def compile_without_gpu(case: CompileCase, architecture: int) -> Any:
    """Triton's compiled kernel: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = [name for name in names if (name in case.signature) == (name in case.constants)]
    unknown += [name for name in (*case.signature, *case.constants) if name not in names]
    if unknown:
        raise ValueError(f"{case.name}: arguments not given exactly once as type or constant: {unknown}")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(names)
        if case.signature.get(name, "").startswith("*") or name in case.divisible_by_16
    }
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options))


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(next(iter(triton.backends.nvidia.__path__))) / "bin" / name)


def _run_on(content: bytes, tool: str, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(content)
        return subprocess.run(
            [_tool(tool), *arguments, str(path)], check=True, capture_output=True, text=True, timeout=60
        ).stdout


def _registers(cubin: bytes) -> int:
    found = re.search(r"REG:(\d+)", _run_on(cubin, "cuobjdump", "-res-usage"))
    if found is None:
        raise RuntimeError("cuobjdump names no register count")
    return int(found[1])


def _text_section(cubin: bytes) -> bytes:
    """The machine code of the one kernel in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # A section header's name, offset and length.
    headers = [struct.unpack_from("<I20xQQ", cubin, table + size * index) for index in range(number)]
    for name, offset, length in headers:
        if cubin.startswith(b".text.", headers[names][1] + name):
            return cubin[offset : offset + length]
    raise RuntimeError("the compiled file holds no code")


def _disassemble(texts: Sequence[bytes], architecture: int) -> list[Code]:
    """The programs in one run of the disassembler, laid end to end."""
    if not texts:
        return []
    processor = f"SM{architecture}{'a' if architecture >= 90 else ''}"
    listing = _run_on(b"".join(texts), "nvdisasm", "-ndf", "-b", processor)
    whole = [found for line in listing.splitlines() if (found := _INSTRUCTION.match(line))]
    if len(whole) * INSTRUCTION_BYTES != sum(map(len, texts)):
        raise RuntimeError("nvdisasm left instructions out")
    codes, first = [], 0
    for text in texts:
        last = first + len(text) // INSTRUCTION_BYTES
        codes.append([(instruction[2], _target(instruction[3], first)) for instruction in whole[first:last]])
        first = last
    return codes


def _target(operands: str, first: int) -> int | None:
    """The instruction that the last operand addresses, counted from instruction `first`."""
    address = _TARGET.search(operands)
    return int(address[1], 16) // INSTRUCTION_BYTES - first if address else None


def _main_loop(code: Code) -> Code:
    """The innermost loop with most tensor-core instructions, else the longest one, else everything.

    "Most" and not "first", because spin loops on barriers split a loop's body in the listing. Their
    slow paths come after the kernel's end and jump back into its middle; those are no loops.
    """
    end_of_kernel = max((index for index, (opcode, _) in enumerate(code) if opcode == "EXIT"), default=0)
    bounds = []
    for index, (opcode, target) in enumerate(code[:end_of_kernel]):
        if opcode.startswith("BRA") and target is not None and target <= index:
            bounds.append((target, index + 1))
    # A loop around one with tensor-core instructions is an outer loop; spin loops do not count.
    loops = [code[start:end] for start, end in bounds]
    weights = [sum(_tensor_instructions(loop).values()) for loop in loops]
    innermost = [
        (weight, len(loop), loop)
        for (start, end), weight, loop in zip(bounds, weights, loops, strict=True)
        if not any(
            (start, end) != other and start <= other[0] and other[1] <= end and other_weight
            for other, other_weight in zip(bounds, weights, strict=True)
        )
    ]
    return max(innermost, key=lambda entry: entry[:2])[2] if innermost else code


def _tensor_instructions(code: Code) -> Counter[str]:
    found = (TENSOR_CORE.match(opcode) for opcode, _ in code)
    return Counter(match[1] for match in found if match)


def _class(opcode: str) -> str:
    return next((name for name, pattern in CLASSES if pattern.match(opcode)), "control")
