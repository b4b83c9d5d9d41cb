"""The options of `fedbert-ds plan`, and those that say what machines there are."""

from __future__ import annotations

import argparse

from fedbert_ds.user_path import user_path


def add_plan(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    parser = subcommands.add_parser("plan", help="predict speed, bytes, days and cost of a federation")
    parser.add_argument("--config", type=user_path, metavar="FILE", help="run file: model, cut, window, codecs")
    parser.add_argument("--tokens", type=float, default=1e10, metavar="N", help="to train on (default: 1e10)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the body (default: 1)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="(default: 16)")
    add_machines(parser)
    parser.add_argument("--sweep", action="store_true", help="curves to 10,000 clients and 64 GPUs, into --out")
    parser.add_argument(
        "--validate", type=user_path, metavar="FILE.json", help="predict a record of bench pipeline instead"
    )
    parser.add_argument(
        "--out", type=user_path, metavar="FILE.json", help="write a record; with --sweep a .png beside it"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the run file")
    parser.set_defaults(run=_plan)


def add_machines(parser: argparse.ArgumentParser) -> None:
    """Options for how fast GPUs, clients and links are."""
    parser.add_argument("--tflops", type=float, default=989.0, metavar="N", help="of one GPU, bf16 (default: 989)")
    parser.add_argument("--efficiency", type=float, default=0.4, metavar="X", help="share reached (default: 0.4)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU (default: 80)")
    parser.add_argument("--host-ms", type=float, default=1.5, metavar="MS", help="to launch a layer's training (1.5)")
    parser.add_argument("--cores", type=float, default=4.0, metavar="N", help="of a rank, for codecs (default: 4)")
    parser.add_argument("--client-gflops", type=float, default=100.0, metavar="N", help="a client reaches (100)")
    parser.add_argument("--rtt", type=float, default=50.0, metavar="MS", help="round trip of a client (default: 50)")
    parser.add_argument("--mbit", type=float, default=100.0, metavar="N", help="of a client, each way (default: 100)")
    parser.add_argument("--spread", type=float, default=0.0, metavar="X", help="how unequal clients are; 0.5 is a lot")
    parser.add_argument("--price", type=float, default=2.5, metavar="X", help="of a GPU hour (default: 2.5)")


def _plan(options: argparse.Namespace) -> None:
    from fedbert_ds.planner.command import run_plan

    run_plan(options)
