"""`fedbert-ds bench kernels` with other libraries' kernels beside ours."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from benchmarks.kernels.attention_baselines import attention_baselines
from benchmarks.kernels.row_baselines import layer_norm_baselines, loss_baselines
from fedbert_ds.bench.commands import add_kernels_options, kernels_options
from fedbert_ds.bench.kernels.benchmark import bench_kernels
from fedbert_ds.bench.kernels.problem import Build, Problem
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.kernels"


def further_baselines(problem: Problem, compiled: bool) -> Mapping[str, Build]:
    """Further ways to compute a problem; those that torch.compile makes only if `compiled`."""
    if problem.kernel == "attention":
        return attention_baselines(problem, compiled)
    if problem.kernel == "layer norm":
        return layer_norm_baselines(problem)
    return loss_baselines(problem) if problem.kernel == "linear + cross-entropy" else {}


def build_parser() -> argparse.ArgumentParser:
    """The options of bench kernels."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_kernels_options(parser)
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_kernels(kernels_options(build_parser().parse_args(arguments), PROGRAM), more=further_baselines)


if __name__ == "__main__":
    main()
