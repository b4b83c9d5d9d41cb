"""`fedbert-ds bench pipeline` with the naive trainer beside ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.naive.system import NAIVE
from fedbert_ds.bench.commands import add_pipeline_options, pipeline_options
from fedbert_ds.bench.pipeline.benchmark import bench_pipeline
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.naive"


def build_parser() -> argparse.ArgumentParser:
    """The options of bench pipeline, `naive` among its systems."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_pipeline_options(parser, [NAIVE.name])
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_pipeline(pipeline_options(build_parser().parse_args(arguments), PROGRAM), [NAIVE])


if __name__ == "__main__":
    main()
