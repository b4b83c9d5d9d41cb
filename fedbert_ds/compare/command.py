"""The options of `fedbert-ds compare`; torch is imported when it runs."""

from __future__ import annotations

import argparse

from fedbert_ds.errors import keeps_what_is_finished
from fedbert_ds.user_path import user_path


def add_compare(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compare` to the command line."""
    parser = subcommands.add_parser("compare", help="the same text as federation, centralized, each client alone, ...")
    parser.add_argument("run_file", type=user_path, metavar="RUN_FILE", help="with local clients")
    parser.add_argument(
        "--out", required=True, type=user_path, metavar="DIR", help="for runs and table; finished ones stay"
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        default=[],
        metavar="SYSTEM",
        help="centralized alone alone-share synchronous parallel:N sequential:N fedavg:N diloco:N[:SERVER_LR] "
        "muloco:N[:SERVER_LR] (default: all)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="(default: the run file's)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="of a federated run (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all but clients (default: cpu)")
    parser.add_argument(
        "--evaluations", type=int, default=20, metavar="N", help="of each client alone; the lowest loss counts (20)"
    )
    parser.add_argument(
        "--patience", type=int, metavar="N", help="a client alone ends after so many without a lower loss (default: no)"
    )
    parser.add_argument(
        "--glue", type=user_path, metavar="DIR", help="fine-tune every final model; GLUE's original files"
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="RTE, STS-B, ... for --glue")
    parser.add_argument("--glue-seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--glue-epochs", type=int, metavar="N", help="(default: 3; MRPC and RTE 5)")
    parser.add_argument("--glue-learning-rate", type=float, metavar="X", help="(default: 2e-5; small models need more)")
    parser.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change the run file; right behind it"
    )
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.commands import typed
    from fedbert_ds.compare.experiment import compare
    from fedbert_ds.compare.plan import CompareOptions

    with keeps_what_is_finished():
        compare(typed(CompareOptions, options))
