"""Every kernel compiles for every architecture, without a GPU, to what the golden table says.

The table of a Triton release is written by `python -m fedbert_kernels.compile_check --update`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fedbert_kernels.compile_case import ARCHITECTURES, CompileCase
from fedbert_kernels.compile_check import MODULES, compile_cases, golden_path, problems, read_table
from fedbert_kernels.interpreter import HAVE_TRITON

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed"),
    pytest.mark.timeout(900),
]
EXTRA_FOR_DROPOUT = 5
"""Instructions of the main loop that dropout may add for each score."""


@pytest.fixture(scope="module")
def measured() -> dict[str, dict]:
    """{module: {row: counts}} of the modules that have a table for this Triton."""
    modules = [module for module in MODULES if golden_path(module).exists()]
    if not modules:
        pytest.skip(f"no golden table for this Triton: {golden_path('*')}")
    # In a process of its own, where kernels are not interpreted.
    program = (
        "import json, sys\n"
        "from fedbert_kernels.compile_check import measure_all\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps(measure_all(sys.argv[1:])))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *modules]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert result.returncode == 0, result.stderr[-2000:]
    tables: dict[str, dict] = json.loads(result.stdout)
    return tables


@pytest.mark.parametrize("module", MODULES)
def test_nothing_got_worse(module: str, measured) -> None:
    if module not in measured:
        pytest.skip(f"no golden table for this Triton: {golden_path(module)}")
    found = problems(read_table(golden_path(module)), measured[module], compile_cases(module))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward_q", "attention_backward_kv"])
def test_dropout_costs_few_instructions(kernel: str, architecture: int, measured) -> None:
    if "attention" not in measured:
        pytest.skip(f"no golden table for this Triton: {golden_path('attention')}")
    loops = {}
    for suffix in ("", " dropout"):
        name = f"{kernel} bf16 d64{suffix}"
        loops[suffix] = sum(measured["attention"][f"{name} sm_{architecture}"]["loop"].values())
    (case,) = (case for case in compile_cases("attention") if case.name == name and architecture in case.architectures)
    threads = 32 * case.options["num_warps"]
    scores = case.constants["ROWS"] * case.constants["COLUMNS"] / threads
    assert (loops[" dropout"] - loops[""]) / scores <= EXTRA_FOR_DROPOUT


def test_16_bit_attention_runs_on_each_architecture_s_own_tensor_cores() -> None:
    """Of the table, so that a table written anew cannot hide a lost wgmma."""
    if not golden_path("attention").exists():
        pytest.skip(f"no golden table for this Triton: {golden_path('attention')}")
    expected = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}}
    rows = read_table(golden_path("attention"))
    assert len(rows) > 100
    for key, row in rows.items():
        if " fp32 " not in key:
            assert set(row["tensor"]) == expected[key.split()[-1]], key


def test_every_head_size_compiles_in_every_dtype() -> None:
    from fedbert_kernels.attention_launches import padded_head_size

    compiled = {
        (case.constants["D"], case.signature["q_ptr"], case.kernel, architecture)
        for case in compile_cases("attention")
        for architecture in case.architectures
    }
    sizes = {size for size, *_ in compiled}
    assert len(compiled) == len(sizes) * 3 * 3 * len(ARCHITECTURES)
    assert {padded_head_size(size) for size in sizes} == {padded_head_size(size) for size in range(16, 129)}
    assert any(size != padded_head_size(size) for size in sizes)


# ---- the check itself ----

CASE = CompileCase("k", None, {}, {}, architectures=(90,), tensor_cores=True)
GOOD = {"registers": 128, "spills": 0, "shared": 1024, "tensor": {"HGMMA": 8}, "loop": {"float": 100}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD, None),
        (GOOD | {"loop": {"float": 90, "integer": 13}}, None),
        (GOOD | {"loop": {"float": 90, "integer": 14}}, "grew from 100 to 104"),
        (GOOD | {"spills": 1}, "1 spill instructions"),
        (GOOD | {"tensor": {"HMMA": 64}}, "tensor-core instructions were"),
        (GOOD | {"tensor": {}}, "no tensor-core instructions"),
        (GOOD | {"registers": 255}, "fewer blocks fit"),
        (GOOD | {"shared": 100_000}, "fewer blocks fit"),
        ({"error": "CompilationError"}, "does not compile"),
        (None, "no longer compiled"),
    ],
)
def test_what_counts_as_a_problem(row, message: str | None) -> None:
    found = problems({"k sm_90": GOOD}, {"k sm_90": row} if row else {}, [CASE])
    assert any(message in line for line in found) if message else not found


def test_a_case_without_a_row_is_a_problem() -> None:
    assert "not in the table" in problems({}, {"k sm_90": GOOD}, [CASE])[0]


def test_names_of_cases_are_unique() -> None:
    for module in MODULES:
        keys = [(case.name, architecture) for case in compile_cases(module) for architecture in case.architectures]
        assert len(keys) == len(set(keys))


def test_a_case_must_name_every_argument() -> None:
    from fedbert_kernels.disassembly import compile_without_gpu

    class Kernel:
        arg_names = ("x_ptr", "SIZE")

    with pytest.raises(ValueError, match="SIZE"):
        compile_without_gpu(CompileCase("k", Kernel, {"x_ptr": "*fp32"}, {}), 90)
