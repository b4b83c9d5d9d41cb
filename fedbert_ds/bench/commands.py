"""The options of every `fedbert-ds bench NAME`; the benchmark itself is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fedbert_ds.user_path import user_path

Subcommands = argparse._SubParsersAction
Options = TypeVar("Options")
SYSTEMS = ("ours", "centralized")
"""Of `bench pipeline`."""


def add_benches(subcommands: Subcommands[argparse.ArgumentParser]) -> None:
    """Add `bench` and its benchmarks to the command line."""
    parser = subcommands.add_parser("bench", help="measure this machine and write a record")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")

    pipeline = benches.add_parser("pipeline", help="the body's busy share and tokens/s with clients over slow links")
    add_pipeline_options(pipeline)
    pipeline.set_defaults(run=_pipeline)

    network = benches.add_parser("network", help="what a rank's endpoint accepts and what that costs")
    add_out(network, "the record")
    network.add_argument(
        "--what",
        nargs="+",
        choices=["codecs", "ingress", "transfers", "streams"],
        default=["codecs", "ingress", "transfers"],
        help="codecs, rates and costs, large transfers over a link that drops, many streams (all but streams)",
    )
    network.add_argument("--streams", type=int, default=256, metavar="N", help="clients of streams (256)")
    network.add_argument("--minutes", type=float, default=10.0, metavar="M", help="of streams (10)")
    network.set_defaults(run=_network)

    body = benches.add_parser("body", help="training steps of an encoder: packed, beside plain transformers")
    add_out(body, "the record; a .png lies beside it")
    body.add_argument("--data", default="python-docs", metavar="SOURCE", help="text of the sentences, as for eval")
    body.add_argument("--dropout", type=float, default=0.1, metavar="P", help="of hidden states and attention (0.1)")
    body.add_argument("--kernels", choices=["auto", "triton", "torch"], default="auto", help="as in a run file")
    body.add_argument("--rounds", type=int, default=7, metavar="N", help="measurements of each; medians count (7)")
    body.set_defaults(run=_body)

    host = benches.add_parser("host", help="the host's time for a micro-batch, beside plain transformers")
    add_out(host, "the record")
    host.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each; medians count (15)")
    host.set_defaults(run=_host)

    memory = benches.add_parser("memory", help="bytes a token that a micro-batch in flight keeps, counted on a CPU")
    add_out(memory, "the record")
    memory.set_defaults(run=_memory)

    kernels = benches.add_parser("kernels", help="each fused kernel beside the other ways to compute the same")
    add_kernels_options(kernels)
    kernels.set_defaults(run=_kernels)


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """Options of every benchmark: where the record goes, and how thorough it is."""
    parser.add_argument("--out", required=True, type=user_path, metavar="FILE.json", help=what)
    parser.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")


def add_pipeline_options(parser: argparse.ArgumentParser, baselines: Sequence[str] = ()) -> None:
    """The options of `bench pipeline`, for programs with more baselines too."""
    add_out(parser, "the record; a .png lies beside it")
    parser.add_argument(
        "--work", type=user_path, default=Path("runs/bench-pipeline"), metavar="DIR", help="for the runs"
    )
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="clients of each run (default: 8)")
    parser.add_argument(
        "--rtt",
        dest="rtt_ms",
        type=float,
        nargs="+",
        default=[0.0, 50.0, 200.0],
        metavar="MS",
        help="round trips (0 50 200)",
    )
    parser.add_argument("--mbit", type=float, default=100.0, metavar="N", help="Mbit/s of each client, each way")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the body (default: cpu)")
    parser.add_argument("--client-device", default="cpu", metavar="DEVICE", help="of the clients (default: cpu)")
    parser.add_argument(
        "--links", choices=["auto", "proxy", "netem"], default="auto", help="auto: netem where root and kernel allow it"
    )
    parser.add_argument("--only", nargs="+", choices=[*SYSTEMS, *baselines], default=[], help="systems")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="for all")


def add_kernels_options(parser: argparse.ArgumentParser) -> None:
    """The options of `bench kernels`, for programs with more baselines too."""
    add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--data", default="python-docs", metavar="SOURCE", help="text of the real mixes of lengths")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--tune", action="store_true", help="first find this card's fastest launches, and keep them")


def typed(kind: type[Options], options: argparse.Namespace, program: str = "fedbert-ds", **more: Any) -> Options:
    """A benchmark's options: typed values by field name, the command itself, and `more`."""
    from fedbert_ds.telemetry.record import command_line

    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(options).items() if name in names}
    return kind(**{**given, "command": command_line(program), **more})


def pipeline_options(options: argparse.Namespace, program: str = "fedbert-ds") -> Any:
    """The PipelineOptions that were typed, `--links auto` decided."""
    from fedbert_ds.bench.network.namespace import links_available
    from fedbert_ds.bench.pipeline.settings import PipelineOptions

    links = links_available() if options.links == "auto" else options.links
    return typed(PipelineOptions, options, program, links=links)


def kernels_options(options: argparse.Namespace, program: str = "fedbert-ds") -> Any:
    """The KernelsOptions that were typed; RunError for a kernel that does not exist."""
    from fedbert_ds.bench.kernels.benchmark import KernelsOptions, parse_kernels

    return typed(KernelsOptions, options, program, kernels=parse_kernels(options.kernel))


def _pipeline(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.pipeline.benchmark import bench_pipeline

    bench_pipeline(pipeline_options(options))


def _network(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.network.benchmark import NetworkOptions, bench_network

    bench_network(typed(NetworkOptions, options))


def _body(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.body.benchmark import BodyOptions, bench_body

    bench_body(typed(BodyOptions, options))


def _host(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.host.benchmark import HostOptions, bench_host

    bench_host(typed(HostOptions, options))


def _memory(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.memory.benchmark import MemoryOptions, bench_memory

    bench_memory(typed(MemoryOptions, options))


def _kernels(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.kernels.benchmark import bench_kernels

    bench_kernels(kernels_options(options))
