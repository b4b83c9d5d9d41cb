"""The console command `fedbert-ds`: take part as a client, evaluate a checkpoint, measure."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_ds import __version__
from fedbert_ds.errors import ConfigError, one_line_errors

if TYPE_CHECKING:
    from fedbert_ds.config import Cut


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one subcommand."""
    parser = argparse.ArgumentParser(prog="fedbert-ds", description="Federated split pre-training of BERT.")
    parser.add_argument("--version", action="version", version=f"fedbert-ds {__version__}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_client(subcommands)
    _add_eval(subcommands)
    _add_bench(subcommands)
    _add_plan(subcommands)
    options = parser.parse_args(arguments)
    options.run(options)


def _add_client(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser("client", help="take part in a run with your own text")
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="the coordinator's address")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="PATH", help=".txt/.jsonl/.parquet/.tokens files, folders, hub:NAME"
    )
    parser.add_argument("--id", default=socket.gethostname(), help="this client's name in the run (default: host name)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="where to keep its state (default: fedbert-ID)")
    parser.add_argument("--tokenizer", metavar="NAME", help="insist on this tokenizer (default: take the server's)")
    parser.add_argument("--model", metavar="NAME", help="insist on this model's shape (default: take the server's)")
    parser.add_argument("--cut", metavar="CUT", help="insist on this cut: embeddings, rows or layers:K (default: any)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: accelerate's choice)")
    parser.add_argument(
        "--join-timeout", type=float, default=3600.0, metavar="S", help="seconds to wait for the others"
    )
    parser.add_argument("--connect-timeout", type=float, default=60.0, metavar="S", help="seconds to reach the server")
    for name in ("ca", "certificate", "key"):
        parser.add_argument(f"--{name}", type=Path, metavar="PEM", help=f"mutual TLS: {name}")
    parser.add_argument("--managed", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_client)


def _client(options: argparse.Namespace) -> None:
    # Imported here: a mistyped command must not wait for torch.
    from fedbert_ds.client.session import ClientOptions, run_client
    from fedbert_ds.wire.channel import TlsFiles

    tls_files = (options.ca, options.certificate, options.key)
    if any(tls_files) and not all(tls_files):
        raise ConfigError("mutual TLS needs all of --ca, --certificate and --key")
    exit_code = run_client(
        ClientOptions(
            server=options.server,
            data=tuple(options.data),
            name=options.id,
            state_folder=options.state or Path(f"fedbert-{options.id}"),
            tokenizer=options.tokenizer,
            model=options.model,
            cut=_cut(options.cut) if options.cut else None,
            tls=TlsFiles(*tls_files) if all(tls_files) else None,
            device=options.device,
            join_timeout=options.join_timeout,
            connect_timeout=options.connect_timeout,
            managed=options.managed,
        )
    )
    raise SystemExit(exit_code)


def _cut(text: str) -> Cut:
    from fedbert_ds.config import LayersCut

    kind, _, layers = text.partition(":")
    if text in ("embeddings", "rows"):
        return "rows" if text == "rows" else "embeddings"
    if kind == "layers" and layers.isdecimal() and int(layers) > 0:
        return LayersCut(layers=int(layers))
    raise ConfigError(f"--cut {text}: choose embeddings, rows or layers:K")


def _add_eval(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser("eval", help="masked-LM loss and perplexity of any Hugging Face masked LM")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or hub name")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="text, as for a client")
    parser.add_argument("--seed", type=int, default=0, help="masking seed; the same seed gives the same number")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at once")
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> None:
    from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

    result = evaluate_masked_lm(options.model, options.data, seed=options.seed, batch_size=options.batch_size)
    print(f"masked-LM loss {result.loss:.4f} nats, perplexity {result.perplexity:.2f}")
    print(f"{result.masked_tokens:,} masked tokens in {result.sequences:,} sequences, masking seed {options.seed}")


def _add_bench(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser("bench", help="measure and write a record")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    modes = benches.add_parser("modes", help="federated modes and centralized training on the same text, side by side")
    modes.add_argument("--data", required=True, metavar="FILE.tokens", help="articles: a WikiText file, or as for eval")
    modes.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record; a .png lies beside it")
    modes.add_argument("--work", type=Path, default=Path("runs/bench-modes"), metavar="DIR", help="for the runs")
    modes.add_argument("--windows", type=int, metavar="N", help="windows of each run (default: the run file's)")
    modes.add_argument("--staleness", action="store_true", help="exact windows beside bounded staleness instead")
    modes.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    modes.add_argument("overrides", nargs="*", metavar="section.key=value", help="change configs/wikitext.yaml")
    modes.set_defaults(run=_bench_modes)
    ingress = benches.add_parser("ingress", help="what an endpoint accepts and what that costs")
    ingress.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record")
    ingress.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    ingress.set_defaults(run=_bench_ingress)
    transfers = benches.add_parser("transfers", help="large transfers over a limited link that drops")
    transfers.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record")
    transfers.add_argument("--quick", action="store_true", help="a tenth of the half")
    transfers.set_defaults(run=_bench_transfers)
    streams = benches.add_parser("streams", help="many client streams at one endpoint for a long time")
    streams.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record")
    streams.add_argument("--streams", type=int, default=256, metavar="N")
    streams.add_argument("--minutes", type=float, default=10.0, metavar="M")
    streams.set_defaults(run=_bench_streams)
    body = benches.add_parser("body", help="training steps of an encoder: packed, beside plain transformers")
    body.add_argument("--data", default="python-docs", metavar="SOURCE", help="text of the sentences, as for eval")
    body.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record; a .png lies beside it")
    body.add_argument("--dropout", type=float, default=0.1, metavar="P", help="of hidden states and attention (0.1)")
    body.add_argument("--kernels", choices=["auto", "triton", "torch"], default="auto", help="as in a run file (auto)")
    body.add_argument("--rounds", type=int, default=7, metavar="N", help="measurements of each; medians count (7)")
    body.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    body.set_defaults(run=_bench_body)
    kernels = benches.add_parser("kernels", help="each fused kernel beside the other ways to compute the same")
    kernels.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record; a .png beside it")
    kernels.add_argument("--data", default="python-docs", metavar="SOURCE", help="text of the real mixes of lengths")
    kernels.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    kernels.add_argument("--tune", action="store_true", help="first find this card's fastest launches, and keep them")
    kernels.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    kernels.set_defaults(run=_bench_kernels)
    codecs = benches.add_parser("codecs", help="what each wire codec costs in loss at equal tokens, and in bytes")
    codecs.add_argument("--data", default="python-docs", metavar="SOURCE", help="articles, as for eval (python-docs)")
    codecs.add_argument(
        "--out", required=True, type=Path, metavar="FILE.json", help="the record; a .png lies beside it"
    )
    codecs.add_argument("--work", type=Path, default=Path("runs/bench-codecs"), metavar="DIR", help="for finished runs")
    codecs.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (3)")
    codecs.add_argument("--minutes", type=float, metavar="N", help="begin no run after that, and record what is done")
    codecs.add_argument(
        "--vocabulary", metavar="NAME", help="tokenizer to count bytes with (30,522 pieces of the text)"
    )
    codecs.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    codecs.add_argument("overrides", nargs="*", metavar="section.key=value", help="change configs/default.yaml")
    codecs.set_defaults(run=_bench_codecs)

    pipeline = benches.add_parser("pipeline", help="the body's busy share and tokens/s over slow links, beside others")
    pipeline.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record; a .png lies beside")
    pipeline.add_argument("--work", type=Path, default=Path("runs/bench-pipeline"), metavar="DIR", help="for the runs")
    pipeline.add_argument("--clients", type=int, default=8, metavar="N", help="clients of each run (default: 8)")
    pipeline.add_argument(
        "--rtt", type=float, nargs="+", default=[0.0, 50.0, 200.0], metavar="MS", help="round trips (default: 0 50 200)"
    )
    pipeline.add_argument("--mbit", type=float, default=100.0, metavar="N", help="Mbit/s of each client, each way")
    pipeline.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the body (default: cpu)")
    pipeline.add_argument("--client-device", default="cpu", metavar="DEVICE", help="of the clients (default: cpu)")
    pipeline.add_argument(
        "--links", choices=["auto", "proxy", "netem"], default="auto", help="auto: netem where root and kernel allow it"
    )
    pipeline.add_argument("--only", nargs="+", choices=["ours", "naive", "centralized"], default=[], help="systems")
    pipeline.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    pipeline.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for all systems alike")
    pipeline.set_defaults(run=_bench_pipeline)


def _bench_body(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.body import BodyOptions, bench_body
    from fedbert_ds.bench.record import command_line

    bench_body(
        BodyOptions(
            out=options.out,
            command=command_line(),
            data=options.data,
            dropout=options.dropout,
            kernels=options.kernels,
            rounds=options.rounds,
            quick=options.quick,
        )
    )


def _bench_kernels(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.kernels import KernelsOptions, bench_kernels, parse_kernels
    from fedbert_ds.bench.record import command_line

    bench_kernels(
        KernelsOptions(
            out=options.out,
            command=command_line(),
            data=options.data,
            kernels=parse_kernels(options.kernel),
            tune=options.tune,
            quick=options.quick,
        )
    )


def _bench_modes(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.modes import ModesOptions, bench_modes
    from fedbert_ds.bench.record import command_line

    windows = [] if options.windows is None else [f"run.windows={options.windows}"]
    bench_modes(
        ModesOptions(
            data=options.data,
            out=options.out,
            command=command_line(),
            work=options.work,
            quick=options.quick,
            staleness=options.staleness,
            overrides=(*windows, *options.overrides),
        )
    )


def _bench_codecs(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.codecs import CodecsOptions, bench_codecs
    from fedbert_ds.bench.record import command_line

    bench_codecs(
        CodecsOptions(
            out=options.out,
            command=command_line(),
            data=options.data,
            work=options.work,
            seeds=options.seeds,
            minutes=options.minutes,
            vocabulary=options.vocabulary,
            quick=options.quick,
            overrides=tuple(options.overrides),
        )
    )


def _bench_pipeline(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.link import links_available
    from fedbert_ds.bench.pipeline import PipelineOptions, bench_pipeline
    from fedbert_ds.bench.record import command_line

    bench_pipeline(
        PipelineOptions(
            out=options.out,
            command=command_line(),
            work=options.work,
            clients=options.clients,
            rtt_ms=tuple(options.rtt),
            mbit=options.mbit,
            quick=options.quick,
            device=options.device,
            client_device=options.client_device,
            links=links_available() if options.links == "auto" else options.links,
            only=tuple(options.only),
            overrides=tuple(options.set),
        )
    )


def _bench_ingress(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.ingress import IngressOptions, bench_ingress
    from fedbert_ds.bench.record import command_line

    bench_ingress(IngressOptions(out=options.out, command=command_line(), quick=options.quick))


def _bench_transfers(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.record import command_line
    from fedbert_ds.bench.transfers import TransfersOptions, bench_transfers

    bench_transfers(TransfersOptions(out=options.out, command=command_line(), quick=options.quick))


def _bench_streams(options: argparse.Namespace) -> None:
    from fedbert_ds.bench.record import command_line
    from fedbert_ds.bench.streams import StreamsOptions, bench_streams

    bench_streams(
        StreamsOptions(out=options.out, command=command_line(), streams=options.streams, minutes=options.minutes)
    )


def _add_plan(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser("plan", help="predict speed, bytes, days and cost of a federation")
    parser.add_argument("--config", type=Path, metavar="FILE", help="run file: model, cut, window, codecs")
    parser.add_argument("--tokens", type=float, default=1e10, metavar="N", help="to train on (default: 1e10)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the body (default: 1)")
    parser.add_argument("--tflops", type=float, default=989.0, metavar="N", help="of one GPU, bf16 (default: 989)")
    parser.add_argument("--efficiency", type=float, default=0.4, metavar="X", help="share reached (default: 0.4)")
    parser.add_argument("--price", type=float, default=2.5, metavar="X", help="of a GPU hour (default: 2.5)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="(default: 16)")
    parser.add_argument("--client-gflops", type=float, default=100.0, metavar="N", help="a client reaches (100)")
    parser.add_argument("--rtt", type=float, default=50.0, metavar="MS", help="round trip of a client (default: 50)")
    parser.add_argument("--mbit", type=float, default=100.0, metavar="N", help="of a client, each way (default: 100)")
    parser.add_argument("--spread", type=float, default=0.0, metavar="X", help="how unequal clients are; 0.5 is a lot")
    parser.add_argument("--sweep", action="store_true", help="curves to 10,000 clients and 64 GPUs, into --out")
    parser.add_argument("--validate", type=Path, metavar="FILE.json", help="predict a record of bench pipeline instead")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write a record; with --sweep a .png beside it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the run file")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from fedbert_ds.planner.command import run_plan

    run_plan(options)


if __name__ == "__main__":
    main()
