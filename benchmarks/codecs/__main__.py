"""What each wire codec costs in loss at equal tokens, and in bytes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.codecs.benchmark import bench_codecs
from benchmarks.codecs.settings import CHOICES, CodecsOptions
from fedbert_ds.bench.commands import add_out, typed
from fedbert_ds.errors import one_line_errors

PROGRAM = "python -m benchmarks.codecs"


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--data", default="python-docs", metavar="SOURCE", help="articles, as for eval (python-docs)")
    add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-codecs"), metavar="DIR", help="for finished runs")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (3)")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no run after that, and record what is done")
    parser.add_argument(
        "--vocabulary", metavar="NAME", help="tokenizer to count bytes with (30,522 pieces of the text)"
    )
    parser.add_argument("--count", nargs="+", default=[], metavar="SOURCE", help="count bytes of these texts, too")
    parser.add_argument("--codecs", nargs="+", default=[], choices=CHOICES, metavar="CODEC", help="of all, these alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change configs/default.yaml")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    bench_codecs(typed(CodecsOptions, build_parser().parse_args(arguments), PROGRAM))


if __name__ == "__main__":
    main()
