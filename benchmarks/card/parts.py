"""One step on the device: python -m benchmarks.card.parts NAME. A row of JSON a line, at once.

Without a GPU every step runs at toy size, to show that it does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.card.window import EngineCase, measured
from benchmarks.kernels.attention_baselines import attention_baselines
from fedbert_ds.bench.body.encoders import Shape, Step, Window, packed_step, padded_step, varlen_step
from fedbert_ds.bench.device import default_device, memory_bandwidth, time_side_by_side
from fedbert_ds.bench.kernels.attention import attention_problem
from fedbert_ds.bench.kernels.problem import measure
from fedbert_ds.server.body.distributed import initialize, shut_down
from fedbert_ds.server.body.peak import matmul, nominal_rate, peak_of
from fedbert_ds.telemetry.metrics import read_metrics, summary

ROOT = Path(__file__).resolve().parents[2]
DEVICE = default_device()
IS_TOY = DEVICE.type == "cpu"
DTYPE = torch.float32 if IS_TOY else torch.bfloat16
BASE, LARGE, TOY = Shape("bert-base", 12, 768, 12), Shape("bert-large", 24, 1024, 16), Shape("toy", 2, 64, 2)
HARDWARE_TESTS = ("tests/unit/server/body/test_device_work.py", "tests/unit/kernels")
TOY_TESTS = ("tests/unit/server/body/test_device_work.py",)

Rows = Iterator[dict[str, Any]]


def facts() -> Rows:
    """Rates that nothing exceeds."""
    peak = peak_of(DEVICE, DTYPE)
    copies = memory_bandwidth(DEVICE, 1 << 24 if IS_TOY else None)
    yield {"product_flops_per_second": peak.measured, "nominal": peak.nominal, "copied_bytes_per_second": copies}


def waits() -> Rows:
    """Windows through the engine: calls that wait, the host's time, what the card computes."""
    initialize()
    shape, sizes, length = (TOY, (256,), 32) if IS_TOY else (BASE, (8192, 32768), 128)
    for stage in (1, 0, 2):
        for tokens in sizes:
            yield measured(EngineCase(shape, stage, tokens, length, num_micro_batches=4 if IS_TOY else 16), DEVICE)
    shut_down()


def attention() -> Rows:
    """Each way to compute attention over packed sequences, at BERT's head size."""
    mixed = [17, 40, 512, 230, 96, 33, 64, 301] * 13
    cases = {"toy": [8, 3, 5]} if IS_TOY else {"all 512": [512] * 32, "all 128": [128] * 128, "mixed": mixed}
    peak = peak_of(DEVICE, DTYPE).measured
    for dropout in (0.1, 0.0):
        for case, lengths in cases.items():
            heads = 2 if IS_TOY else 16
            problem = attention_problem(case, lengths, heads, 64, DTYPE, dropout, DEVICE, compiled=False)
            ways = {**problem.ways, **attention_baselines(problem, compiled=False)}
            yield from measure(replace(problem, ways=ways), DEVICE, peak, 3, 0.02)


def body() -> Rows:
    """A training step of the body beside transformers' own, on the same window."""
    cases = ((TOY, 32, 512),) if IS_TOY else ((LARGE, 512, 16384), (BASE, 512, 16384), (BASE, 128, 8192))
    for shape, length, budget in cases:
        yield from _side_by_side(shape, length, budget)


def _side_by_side(shape: Shape, length: int, budget: int) -> Rows:
    window = Window.draw([length] * ((512 if IS_TOY else 65536) // length), shape.hidden_size, DEVICE, DTYPE)
    builds: dict[str, Callable[[], Step]] = {
        "ours": lambda: packed_step(shape, window, budget, 0.1, "auto", DEVICE),
        "ours, no dropout": lambda: packed_step(shape, window, budget, 0.0, "auto", DEVICE),
        "ours, kernels: torch": lambda: packed_step(shape, window, budget, 0.1, "torch", DEVICE),
        "transformers, padded": lambda: padded_step(shape, window, budget, 0.1, DEVICE),
        "transformers, varlen": lambda: varlen_step(shape, window, budget, 0.1, DEVICE),
        "transformers, varlen, no dropout": lambda: varlen_step(shape, window, budget, 0.0, DEVICE),
    }
    steps = {}
    for way, build in builds.items():
        try:
            steps[way] = build()
            steps[way].run()
        except (RuntimeError, ImportError) as error:
            steps.pop(way, None)
            yield {"model": shape.name, "length": length, "way": way, "reason": str(error).strip().partition("\n")[0]}
    product, product_flops = matmul(DEVICE, DTYPE, 128 if IS_TOY else None)
    timings = time_side_by_side({**{way: step.run for way, step in steps.items()}, "product": product}, DEVICE, 5)
    nominal = nominal_rate(DEVICE, DTYPE)
    for way, step in steps.items():
        rate = step.flops / timings[way].median
        yield {
            "model": shape.name,
            "length": length,
            "way": way,
            "tokens_per_second": window.num_tokens / timings[way].median,
            "share_of_product": rate * timings["product"].median / product_flops,
            "share_of_nominal": rate / nominal if nominal else None,
        }


def end_to_end() -> Rows:
    """A run through the launcher with local clients; figures of its second half."""
    size = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 128}
    window, length, windows = (131072, 8192), 128, 20
    if IS_TOY:
        size = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 32}
        window, length, windows = (1024, 512), 32, 4
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = {
            "run.directory": run, "run.windows": windows, "run.save_every": 1000, "server.port": 0,
            "body.precision": "fp32" if IS_TOY else "bf16", "body.zero_stage": 1, "data.sequence_length": length,
            "window.tokens": window[0], "window.tokens_per_micro_batch": window[1], "cut": "rows",
            "wire.activations": "int8", "wire.gradients": "int8", **{f"model.{key}": n for key, n in size.items()},
        }  # fmt: skip
        command = [sys.executable, "launchers/pretrain.py", "--config", "configs/default.yaml"]
        settings = [f"{key}={value}" for key, value in overrides.items()]
        subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=sys.stderr)
        rows = read_metrics(run / "metrics.jsonl")
    totals = summary(rows[len(rows) // 2 :])
    names = ("tokens_per_second", "busy_share", "wait_share", "rank_wait_share", "saving_share", "host_share")
    figures = {name: getattr(totals, name) for name in (*names, "flops_per_second", "bytes_per_token")}
    yield {"clients": rows[-1].clients, "windows": totals.windows, **figures}


def tests() -> Rows:
    """How many tests pass here."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        chosen = TOY_TESTS if IS_TOY else HARDWARE_TESTS
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2" if IS_TOY else "8", f"--junit-xml={report}", *chosen]
        subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            yield {"failed": f"{case.get('classname')}.{case.get('name')}"}
    yield {"tests": len(cases), "skipped": sum(case.find("skipped") is not None for case in cases)}


PARTS: dict[str, Callable[[], Rows]] = {
    "facts": facts,
    "waits": waits,
    "attention": attention,
    "body": body,
    "end to end": end_to_end,
    "tests": tests,
}

if __name__ == "__main__":
    for row in PARTS[sys.argv[1]]():
        print(json.dumps(row), flush=True)
