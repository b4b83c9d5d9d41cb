"""Ways to compute the same thing: each is checked against fp64, then all are timed in turn.

Knows no kernel. A way that cannot run or is wrong stays in the result as a row with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.bench.device import peak_memory, time_side_by_side

OURS = "ours"
FORWARD, BOTH = "forward", "forward + backward"
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest error over the largest exact value: rounding and no more. Mistakes are far larger."""
UNBIASED = 0.05
"""With its own dropout mask a result is right on average: its projection on the exact one is 1,
this much off."""
STANDARD_ERRORS = 5.0
"""The same beyond that: how far masks of so few rows may be off by chance."""

DROPPED = 0.05
"""With dropout a result differs from the exact one without it by at least this, over the largest
value."""


class Unavailable(Exception):
    """A baseline that does not run here; says why."""


@dataclass(frozen=True)
class Prepared:
    """One way to compute, with its inputs laid out as it likes them."""

    forward: Callable[[], tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...] = ()
    """Leaves to differentiate by; none if there is no backward."""
    gradients: tuple[Tensor, ...] = ()
    """Of the outputs."""
    unpack: Callable[[tuple[Tensor, ...]], Tensor] = lambda outputs: outputs[0]
    """Outputs in the layout of the exact result."""
    unpack_gradients: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda gradients: gradients
    """Gradients of the inputs in the layout of the exact ones."""

    def run(self, what: str) -> tuple[Tensor, ...]:
        """Outputs, and after `BOTH` the inputs' gradients instead."""
        if what == FORWARD:
            with torch.no_grad():
                return self.forward()
        outputs = self.forward()
        gradients = [gradient.to(output.dtype) for gradient, output in zip(self.gradients, outputs, strict=True)]
        return torch.autograd.grad(outputs, self.inputs, gradients)


Build = Callable[[float], Prepared]
"""Prepares one for a dropout probability; Unavailable, or any other error, if it cannot run."""


@dataclass(frozen=True)
class Problem:
    """What is computed, by whom, and how much work it is."""

    kernel: str
    case: str
    dtype: torch.dtype
    dropout: float
    ways: Mapping[str, Build]
    """By name; OURS is one of them."""
    exact: Callable[[], tuple[Tensor, ...]]
    """(value, *gradients of the inputs), in fp64 and without dropout."""
    work: Mapping[str, float]
    """{FORWARD or BOTH: operations or bytes that the task itself needs, whoever does it}."""
    unit: str
    """`TFLOP/s` or `GB/s`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    """Instead of the dtype's."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What further ways compute with; not in the record."""


def plain(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], gradient: Tensor) -> Prepared:
    """A function of the leaves as it stands."""
    inputs = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    return Prepared(lambda: (function(*inputs),), inputs, (gradient,))


def needs_compiler(compiled: bool) -> None:
    """Unavailable if torch.compile is not wanted."""
    if not compiled:
        raise Unavailable("left out by --quick: compiling takes longer than all else")


def measure(problem: Problem, device: torch.device, peak: float, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of every way and pass; `peak` is the device's, in operations or bytes a second."""
    rows = []
    # Or torch.compile, having seen the same function with many shapes, gives up on it.
    torch.compiler.reset()
    ready, reasons, errors = _check_all(problem, device)
    for what, work in problem.work.items():
        calls = {name: _caller(prepared, what) for (name, passed), prepared in ready.items() if passed == what}
        timings = time_side_by_side(calls, device, rounds, seconds, launch_ahead=True) if calls else {}
        for name in problem.ways:
            row: dict[str, Any] = {
                "kernel": problem.kernel, "case": problem.case, "dropout": problem.dropout,
                "dtype": str(problem.dtype).removeprefix("torch."), **problem.facts, "pass": what, "way": name,
            }  # fmt: skip
            if name in timings:
                timing, rate = timings[name], work / timings[name].median
                figures = {
                    "milliseconds": timing.median * 1e3,
                    "fastest": timing.fastest * 1e3,
                    "slowest": timing.slowest * 1e3,
                    problem.unit: rate / (1e12 if problem.unit == "TFLOP/s" else 1e9),
                    "share_of_peak": rate / peak,
                    "error": errors[name, what],
                }
                # More digits than a timing has only make a record long.
                row |= {key: float(f"{figure:.4g}") for key, figure in figures.items()}
                row["peak_bytes"] = peak_memory(calls[name], device)
            else:
                row["reason"] = reasons[name, what]
            rows.append(row)
    return rows


Key = tuple[str, str]


def _caller(prepared: Prepared, what: str) -> Callable[[], Any]:
    return lambda: prepared.run(what)


def _check_all(problem: Problem, device: torch.device) -> tuple[dict[Key, Prepared], dict[Key, str], dict[Key, float]]:
    """({(way, pass): prepared} that run and are right, their errors, and reasons of the others)."""
    exact = problem.exact()
    ready: dict[Key, Prepared] = {}
    reasons: dict[Key, str] = {}
    errors: dict[Key, float] = {}
    for name, build in problem.ways.items():
        for what in problem.work:
            # Who fails forward is not asked for more.
            if (name, FORWARD) in reasons:
                reasons[name, what] = reasons[name, FORWARD]
                continue
            try:
                ready[name, what], errors[name, what] = _check(problem, build, what, exact)
            except Exception as error:  # Whatever stops one, the others are still to be measured.
                reasons[name, what] = _reason(error)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ready, reasons, errors


def _check(problem: Problem, build: Build, what: str, exact: tuple[Tensor, ...]) -> tuple[Prepared, float]:
    """The way ready to be timed, and its error: of its value, or of the worst of its gradients."""
    # First, so that one without dropout says so before anything is compiled.
    with_dropout = build(problem.dropout)
    prepared = build(0.0) if problem.dropout else with_dropout
    results = prepared.run(what)
    found = (prepared.unpack(results),) if what == FORWARD else prepared.unpack_gradients(results)
    wanted = exact[:1] if what == FORWARD else exact[1:]
    error = max(relative_error(mine, right) for mine, right in zip(found, wanted, strict=True))
    # Written so that NaN is wrong.
    if not error <= (TOLERANCES[problem.dtype] if problem.tolerance is None else problem.tolerance):
        raise Unavailable(f"wrong: off by {error:.1e} of the largest value")
    if problem.dropout:
        _check_dropout(with_dropout, what, exact[0])
    return with_dropout, error


def _check_dropout(prepared: Prepared, what: str, exact: Tensor) -> None:
    results = prepared.run(what)
    if not all(bool(result.isfinite().all()) for result in results):
        raise Unavailable("wrong: with dropout, not finite")
    if what == FORWARD:
        value = prepared.unpack(results).double()
        share = float((value * exact).sum() / exact.square().sum())
        # Rows have masks of their own, so what they are off adds up as independent errors do.
        off = ((value - share * exact) * exact).sum(-1)
        by_chance = float(off.square().sum().sqrt() / exact.square().sum())
        if abs(share - 1.0) > UNBIASED + STANDARD_ERRORS * by_chance:
            raise Unavailable(f"wrong: with dropout, {share:.2f} of the exact result on average")
        if relative_error(value, exact) < DROPPED:
            raise Unavailable("wrong: drops nothing")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value; NaN if anything is."""
    if found.shape != exact.shape:
        raise Unavailable(f"wrong: {list(found.shape)} instead of {list(exact.shape)}")
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _reason(error: Exception) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first_line[:200] if isinstance(error, Unavailable) else f"{type(error).__name__}: {first_line[:160]}"
