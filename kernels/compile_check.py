"""Compiles every kernel for every architecture and compares its counts with the golden tables.

    python -m fedbert_kernels.compile_check                  compare; exit status 1 on a problem
    python -m fedbert_kernels.compile_check --update         write this release's tables and digest
    python -m fedbert_kernels.compile_check --module gelu    one kernel file
    python -m fedbert_kernels.compile_check --only d64       rows with this in their name

Needs no GPU. The last two go with --update too. A kernel file takes part by its name in MODULES and
its `compile_cases() -> list[CompileCase]`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedbert_kernels.compile_case import ARCHITECTURES, CompileCase
from fedbert_kernels.disassembly import measure
from fedbert_kernels.golden_tables import (
    GOLDEN,
    MODULES,
    Row,
    Table,
    golden_path,
    read_table,
    record_digest,
    write_table,
)

TOGETHER = 12
"""Kernels that one run of the disassembler takes."""
KEEP_MEMORY = (
    "glibc.malloc.tcache_count=60000:glibc.malloc.top_pad=268435456:glibc.malloc.trim_threshold=4000000000:"
    "glibc.malloc.hugetlb=1"
)
"""A compiler allocates all the time; glibc's defaults return memory only to fetch it again."""
LOOP_GROWTH = 1.03
"""A main loop longer than this multiple of the table's fails."""


def compile_cases(module: str) -> list[CompileCase]:
    """The cases of one kernel file."""
    cases: list[CompileCase] = importlib.import_module(f"fedbert_kernels.{module}").compile_cases()
    return cases


def measure_all(
    modules: Iterable[str] = MODULES, workers: int | None = None, wanted: Callable[[str], bool] = lambda row: True
) -> dict[str, Table]:
    """Compile the cases whose row, such as "gelu_forward bf16 sm_90", is wanted.

    Returns {module: {row: counts, or {"error": ...} for a case that does not compile}}.
    """
    modules, workers = list(modules), workers or os.cpu_count() or 1
    # Spawned, not forked: the parent may have torch's threads. A new cache, to compile all.
    context = multiprocessing.get_context("spawn")
    measured: dict[tuple[str, str, int], Row] = {}
    os.environ.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
    # Line information is for debuggers; it costs 5 % of the time and changes no instruction.
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(cache,)
        ) as pool,
    ):
        # To import torch and Triton takes seconds; workers do so while this process does.
        for _ in range(workers):
            pool.submit(_import_all, modules)
        chosen = [
            (module, case.name, architecture)
            for module in modules
            for case in compile_cases(module)
            for architecture in case.architectures
            if wanted(f"{case.name} sm_{architecture}")
        ]
        jobs = _jobs(chosen)
        for (architecture, group), rows in zip(jobs, pool.map(_measure_job, jobs), strict=True):
            for (module, name), row in zip(group, rows, strict=True):
                measured[module, name, architecture] = row
    tables: dict[str, Table] = {module: {} for module in modules}
    for module, name, architecture in chosen:
        tables[module][f"{name} sm_{architecture}"] = measured[module, name, architecture]
    return {module: table for module, table in tables.items() if table}


def _jobs(chosen: Sequence[tuple[str, str, int]]) -> list[tuple[int, list[tuple[str, str]]]]:
    """(architecture, (module, case name) of each kernel) of the jobs that workers take."""
    # The newest architecture first: it takes longest, and short jobs should come last.
    return [
        (architecture, group[start : start + TOGETHER])
        for architecture in reversed(ARCHITECTURES)
        for group in [[(module, name) for module, name, wanted in chosen if wanted == architecture]]
        for start in range(0, len(group), TOGETHER)
    ]


def problems(golden: Table, measured: Table, cases: Iterable[CompileCase]) -> list[str]:
    """What got worse than the table or breaks a case's own rules; empty if all is well."""
    found = [f"{key}: in the table, but no longer compiled" for key in golden if key not in measured]
    rules = {f"{case.name} sm_{architecture}": case for case in cases for architecture in case.architectures}
    for key, row in measured.items():
        if "error" in row:
            found.append(f"{key}: does not compile: {row['error']}")
            continue
        if row["spills"] and rules[key].spill_free:
            found.append(f"{key}: {row['spills']} spill instructions")
        if not row["tensor"] and rules[key].tensor_cores:
            found.append(f"{key}: no tensor-core instructions")
        before = golden.get(key)
        if before is None:
            found.append(f"{key}: not in the table; run python -m fedbert_kernels.compile_check --update")
            continue
        lost = {name: count for name, count in before["tensor"].items() if row["tensor"].get(name, 0) < count}
        if lost:
            found.append(f"{key}: tensor-core instructions were {before['tensor']}, are {row['tensor']}")
        length_before, length = sum(before["loop"].values()), sum(row["loop"].values())
        if length > length_before * LOOP_GROWTH:
            found.append(f"{key}: main loop grew from {length_before} to {length} instructions")
        if row["spills"] > before["spills"]:
            found.append(f"{key}: spill instructions grew from {before['spills']} to {row['spills']}")
        if _blocks_per_multiprocessor(row) < _blocks_per_multiprocessor(before):
            found.append(
                f"{key}: fewer blocks fit: {before['registers']} registers, {before['shared']} bytes shared before;"
                f" {row['registers']} and {row['shared']} now"
            )
    return found


def _start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)


def _import_all(modules: Sequence[str]) -> None:
    for module in modules:
        compile_cases(module)


def _measure_job(job: tuple[int, list[tuple[str, str]]]) -> list[Row]:
    architecture, group = job
    return measure([_case(module, name, architecture) for module, name in group], architecture)


@functools.cache
def _case(module: str, name: str, architecture: int) -> CompileCase:
    return next(case for case in compile_cases(module) if case.name == name and architecture in case.architectures)


def _blocks_per_multiprocessor(row: Row) -> int:
    # 64 Ki registers, and the smallest shared memory of the three, 164 KiB: only a drop matters.
    by_registers = 65536 // (max(row["registers"], 1) * 128)
    return min(by_registers, 167936 // max(row["shared"], 1024), 16)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel without a GPU; compare with the golden table.")
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing")
    parser.add_argument("--module", action="append", choices=MODULES, help="only this kernel file (repeatable)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="folder of the tables")
    options = parser.parse_args(arguments)
    failures = 0
    measured = measure_all(options.module or MODULES, options.workers, lambda row: options.only in row)
    for module, table in measured.items():
        path = golden_path(module, options.golden)
        golden = read_table(path) if path.exists() else {}
        if options.update and not any("error" in row for row in table.values()):
            golden = golden | table if options.only else table
            write_table(path, golden)
        golden = {key: row for key, row in golden.items() if options.only in key}
        found = problems(golden, table, compile_cases(module))
        print(f"{module}: {len(table)} compiled, {len(found)} problems", *found, sep="\n  ")
        failures += len(found)
    if options.update and not failures and not options.module and not options.only:
        record_digest(options.golden)
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
