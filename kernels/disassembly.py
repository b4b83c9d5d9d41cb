"""Compiles a kernel for a GPU that is not there and counts what the disassembly holds.

The counts are exact and repeatable for one Triton release; they say nothing about time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
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
"""Instruction classes, first match wins; what matches none (barriers, branches, waits) is "control"."""

_LABEL = re.compile(r"^\s*\.(L_x_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
_TARGET = re.compile(r"`\(\.(L_x_\w+)\)")


def measure(case: CompileCase, architecture: int) -> dict[str, Any]:
    """Registers, spills, shared memory, tensor-core instructions and inner loop; raises if it will not compile."""
    compiled = compile_without_gpu(case, architecture)
    cubin = compiled.asm["cubin"]
    instructions, labels = _disassemble(cubin)
    loop = _main_loop(instructions, labels)
    return {
        "registers": _registers(cubin),
        "spills": sum(_class(opcode) == "local memory" for opcode, _ in instructions),
        "shared": compiled.metadata.shared,
        "tensor": dict(sorted(_tensor_instructions(instructions).items())),
        "loop": dict(sorted(Counter(_class(opcode) for opcode, _ in loop).items())),
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


def _run_on(cubin: bytes, tool: str, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [_tool(tool), *arguments, str(path)], check=True, capture_output=True, text=True, timeout=60
        ).stdout


def _registers(cubin: bytes) -> int:
    found = re.search(r"REG:(\d+)", _run_on(cubin, "cuobjdump", "-res-usage"))
    if found is None:
        raise RuntimeError("cuobjdump names no register count")
    return int(found[1])


def _disassemble(cubin: bytes) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """[(opcode, operands)] of the kernel, and for each label the index of the instruction after it."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in _run_on(cubin, "nvdisasm", "-c", "-ndf").splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append((instruction[2], instruction[3]))
    return instructions, labels


def _main_loop(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[tuple[str, str]]:
    """The innermost loop with most tensor-core instructions, else the longest innermost loop, else everything.

    Spin loops on barriers split a loop's body in the listing, hence "most" and not "first". Their slow paths lie behind
    the kernel's end and jump back into its middle: those are no loops.
    """
    end_of_kernel = max((index for index, (opcode, _) in enumerate(instructions) if opcode == "EXIT"), default=0)
    bounds = []
    for index, (opcode, operands) in enumerate(instructions[:end_of_kernel]):
        target = _TARGET.search(operands)
        if opcode.startswith("BRA") and target and labels.get(target[1], index + 1) <= index:
            bounds.append((labels[target[1]], index + 1))
    # A loop that holds another with tensor-core instructions is an outer loop; waiting loops do not count as inner.
    loops = [instructions[start:end] for start, end in bounds]
    weights = [sum(_tensor_instructions(loop).values()) for loop in loops]
    innermost = [
        (weight, len(loop), loop)
        for (start, end), weight, loop in zip(bounds, weights, loops, strict=True)
        if not any(
            (start, end) != other and start <= other[0] and other[1] <= end and other_weight
            for other, other_weight in zip(bounds, weights, strict=True)
        )
    ]
    return max(innermost, key=lambda entry: entry[:2])[2] if innermost else instructions


def _tensor_instructions(instructions: list[tuple[str, str]]) -> Counter[str]:
    found = (TENSOR_CORE.match(opcode) for opcode, _ in instructions)
    return Counter(match[1] for match in found if match)


def _class(opcode: str) -> str:
    return next((name for name, pattern in CLASSES if pattern.match(opcode)), "control")
