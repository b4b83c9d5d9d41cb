"""The options of every `fedbert-ds bench NAME`; what they run is imported only when it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

Subcommands = argparse._SubParsersAction
Options = TypeVar("Options")


def add_benches(subcommands: Subcommands[argparse.ArgumentParser]) -> None:
    """Add `bench` and its benchmarks to the command line."""
    parser = subcommands.add_parser("bench", help="measure and write a record")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for add in (
        _add_modes,
        _add_codecs,
        _add_pipeline,
        _add_ingress,
        _add_transfers,
        _add_streams,
        _add_body,
        _add_kernels,
    ):
        add(benches)


def _add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json", help=what)


def _add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")


def _typed(kind: type[Options], options: argparse.Namespace, **more: Any) -> Options:
    """A benchmark's options: what was typed under the names of its fields, the command itself, and `more`."""
    from fedbert_ds.telemetry.record import command_line

    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    typed: Mapping[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name in names
    }
    return kind(**{**typed, "command": command_line(), **more})


def _add_modes(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("modes", help="federated modes and centralized training on the same text, side by side")
    parser.add_argument("--data", required=True, metavar="FILE.tokens", help="articles: WikiText, or as for eval")
    _add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-modes"), metavar="DIR", help="for the runs")
    parser.add_argument("--windows", type=int, metavar="N", help="windows of each run (default: the run file's)")
    parser.add_argument("--staleness", action="store_true", help="exact windows beside bounded staleness instead")
    _add_quick(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change configs/wikitext.yaml")
    parser.set_defaults(run=_modes)


def _modes(options: argparse.Namespace) -> None:
    from benchmarks.modes.benchmark import ModesOptions, bench_modes

    windows = [] if options.windows is None else [f"run.windows={options.windows}"]
    bench_modes(_typed(ModesOptions, options, overrides=(*windows, *options.overrides)))


def _add_codecs(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("codecs", help="what each wire codec costs in loss at equal tokens, and in bytes")
    parser.add_argument("--data", default="python-docs", metavar="SOURCE", help="articles, as for eval (python-docs)")
    _add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-codecs"), metavar="DIR", help="for finished runs")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (3)")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no run after that, and record what is done")
    parser.add_argument(
        "--vocabulary", metavar="NAME", help="tokenizer to count bytes with (30,522 pieces of the text)"
    )
    parser.add_argument("--count", nargs="+", default=[], metavar="SOURCE", help="count bytes of these texts, too")
    _add_quick(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change configs/default.yaml")
    parser.set_defaults(run=_codecs)


def _codecs(options: argparse.Namespace) -> None:
    from benchmarks.codecs.benchmark import CodecsOptions, bench_codecs

    bench_codecs(_typed(CodecsOptions, options))


def _add_pipeline(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("pipeline", help="the body's busy share and tokens/s over slow links, beside others")
    _add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-pipeline"), metavar="DIR", help="for the runs")
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
    parser.add_argument("--only", nargs="+", choices=["ours", "naive", "centralized"], default=[], help="systems")
    _add_quick(parser)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="for all")
    parser.set_defaults(run=_pipeline)


def _pipeline(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.network.link import links_available
    from fedbert_ds.bench.pipeline.benchmark import PipelineOptions, bench_pipeline

    links = links_available() if options.links == "auto" else options.links
    bench_pipeline(_typed(PipelineOptions, options, links=links))


def _add_ingress(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("ingress", help="what an endpoint accepts and what that costs")
    _add_out(parser, "the record")
    _add_quick(parser)
    parser.set_defaults(run=_ingress)


def _ingress(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.network.ingress import IngressOptions, bench_ingress

    bench_ingress(_typed(IngressOptions, options))


def _add_transfers(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("transfers", help="large transfers over a limited link that drops")
    _add_out(parser, "the record")
    parser.add_argument("--quick", action="store_true", help="a tenth of the half")
    parser.set_defaults(run=_transfers)


def _transfers(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.network.transfers import TransfersOptions, bench_transfers

    bench_transfers(_typed(TransfersOptions, options))


def _add_streams(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("streams", help="many client streams at one endpoint for a long time")
    _add_out(parser, "the record")
    parser.add_argument("--streams", type=int, default=256, metavar="N")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M")
    parser.set_defaults(run=_streams)


def _streams(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.network.streams import StreamsOptions, bench_streams

    bench_streams(_typed(StreamsOptions, options))


def _add_body(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("body", help="training steps of an encoder: packed, beside plain transformers")
    parser.add_argument("--data", default="python-docs", metavar="SOURCE", help="text of the sentences, as for eval")
    _add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--dropout", type=float, default=0.1, metavar="P", help="of hidden states and attention (0.1)")
    parser.add_argument("--kernels", choices=["auto", "triton", "torch"], default="auto", help="as in a run file")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="measurements of each; medians count (7)")
    _add_quick(parser)
    parser.set_defaults(run=_body)


def _body(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.body.benchmark import BodyOptions, bench_body

    bench_body(_typed(BodyOptions, options))


def _add_kernels(benches: Subcommands[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser("kernels", help="each fused kernel beside the other ways to compute the same")
    _add_out(parser, "the record; a .png lies beside it")
    parser.add_argument("--data", default="python-docs", metavar="SOURCE", help="text of the real mixes of lengths")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--tune", action="store_true", help="first find this card's fastest launches, and keep them")
    _add_quick(parser)
    parser.set_defaults(run=_kernels)


def _kernels(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.kernels.benchmark import KernelsOptions, bench_kernels, parse_kernels

    bench_kernels(_typed(KernelsOptions, options, kernels=parse_kernels(options.kernel)))
