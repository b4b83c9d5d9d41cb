"""Every kernel's counts on every architecture, without a GPU: a Triton release's golden tables.

`make compile-check` compiles all of it. While the sources are those that the tables were measured
on, the tables are the measurement, and only a sample is compiled here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fedbert_kernels.compile_case import ARCHITECTURES, CompileCase
from fedbert_kernels.compile_check import compile_cases, problems
from fedbert_kernels.golden_tables import MODULES, golden_path, read_table, recorded_digest, sources_digest
from fedbert_kernels.interpreter import HAVE_TRITON

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed"),
    pytest.mark.timeout(900),
]
EXTRA_FOR_DROPOUT = 5
"""Instructions of the main loop that dropout may add for each score."""
SAMPLE = {
    "attention_forward bf16 d64 dropout sm_90",
    "attention_backward_q bf16 d64 dropout sliding_window sm_80",
    "attention_backward_kv bf16 d64 dropout sm_100",
    "layer_norm_forward bf16 h768 dropout sm_90",
    "layer_norm_backward fp16 h1024 dropout sm_80",
    "gelu_forward fp32 sm_80",
    "gelu_backward bf16 sm_100",
    "cross_entropy bf16 sm_90",
    "quantize fp8_e4m3 bf16 stochastic sm_90",
    "dequantize int4_hadamard bf16 sm_100",
}
"""Rows compiled on every run: every kernel once, every architecture three times or more."""


def compiled_now(rows: set[str] | None = None) -> dict[str, dict]:
    """{module: {row: counts}} of these rows or all, from a process without the interpreter."""
    program = (
        "import json, sys\n"
        "from fedbert_kernels.compile_check import measure_all\n"
        "if __name__ == '__main__':\n"
        "    rows = json.loads(sys.argv[1])\n"
        "    measured = measure_all(workers=rows and 1, wanted=lambda row: rows is None or row in rows)\n"
        "    print(json.dumps(measured))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, json.dumps(rows and sorted(rows))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert result.returncode == 0, result.stderr[-2000:]
    tables: dict[str, dict] = json.loads(result.stdout)
    return tables


@pytest.fixture(scope="module")
def tables() -> dict[str, dict]:
    """{module: {row: counts}} as recorded for this Triton."""
    if not golden_path("attention").exists():
        pytest.skip(f"no golden tables for this Triton: {golden_path('attention').parent}")
    return {module: read_table(golden_path(module)) for module in MODULES}


@pytest.fixture(scope="module")
def measured(tables) -> dict[str, dict]:
    """{module: {row: counts}} of these sources."""
    # The tables of triton-3.6.0 are older than digests: with that release, every run compiles all.
    return tables if recorded_digest() else compiled_now()


def test_the_tables_were_measured_on_these_sources(tables) -> None:
    if recorded_digest() not in (None, sources_digest()):
        pytest.fail("kernels changed since their golden tables: run make compile-check ARGS=--update", pytrace=False)


def test_a_sample_compiles_to_what_the_tables_say(tables) -> None:
    if recorded_digest() is None:
        pytest.skip("all is compiled: test_nothing_got_worse")
    sample = compiled_now(SAMPLE)
    assert {row for table in sample.values() for row in table} == SAMPLE
    for module, table in sample.items():
        golden = {row: tables[module][row] for row in table}
        found = problems(golden, table, compile_cases(module))
        assert not found, "\n".join(found)


def test_the_sample_has_every_kernel_and_architecture() -> None:
    cases = [
        (case.kernel, architecture, f"{case.name} sm_{architecture}" in SAMPLE)
        for module in MODULES
        for case in compile_cases(module)
        for architecture in case.architectures
    ]
    assert {kernel for kernel, _, in_sample in cases if in_sample} == {kernel for kernel, _, _ in cases}
    assert {architecture for _, architecture, in_sample in cases if in_sample} == set(ARCHITECTURES)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_got_worse(module: str, tables, measured) -> None:
    found = problems(tables[module], measured[module], compile_cases(module))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward_q", "attention_backward_kv"])
def test_dropout_costs_few_instructions(kernel: str, architecture: int, measured) -> None:
    loops = {}
    for suffix in ("", " dropout"):
        name = f"{kernel} bf16 d64{suffix}"
        loops[suffix] = sum(measured["attention"][f"{name} sm_{architecture}"]["loop"].values())
    (case,) = (case for case in compile_cases("attention") if case.name == name and architecture in case.architectures)
    threads = 32 * case.options["num_warps"]
    scores = case.constants["ROWS"] * case.constants["COLUMNS"] / threads
    assert (loops[" dropout"] - loops[""]) / scores <= EXTRA_FOR_DROPOUT


def test_16_bit_attention_runs_on_each_architecture_s_own_tensor_cores(tables) -> None:
    """Of the table, so that a table written anew cannot hide a lost wgmma."""
    expected = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}}
    assert len(tables["attention"]) > 100
    for key, row in tables["attention"].items():
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


def has_one_variant(kernel: Any, count: str) -> bool:
    """Whether the kernel is compiled once for all values of a count."""
    if hasattr(kernel, "kwargs"):  # in the interpreter
        return count in kernel.kwargs.get("do_not_specialize", ())
    return any(parameter.name == count and parameter.do_not_specialize for parameter in kernel.params)


@pytest.mark.parametrize("module", MODULES)
def test_no_kernel_is_compiled_anew_for_another_number_of_tokens(module: str) -> None:
    """By default Triton compiles one variant for multiples of 16, one for 1, one for the rest."""
    for case in compile_cases(module):
        for count in {"num_rows", "num_tokens"} & case.signature.keys():
            assert has_one_variant(case.kernel, count), (case.name, count)
            assert count not in case.divisible_by_16, "it is compiled here as it is in a run"
