"""The console command `fedbert-ds`: client, aggregator, merging, evaluation, GLUE, measurements."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_ds import __version__
from fedbert_ds.bench.commands import add_benches
from fedbert_ds.certificates.commands import add_certs
from fedbert_ds.compare.command import add_compare
from fedbert_ds.errors import ConfigError, one_line_errors, warn
from fedbert_ds.glue.command import add_glue
from fedbert_ds.init.command import add_init
from fedbert_ds.planner.options import add_plan
from fedbert_ds.user_path import expanded, user_path
from fedbert_ds.vocabulary.commands import add_vocab
from fedbert_ds.wire.verbosity import be_quiet, tell_of_handshakes

if TYPE_CHECKING:
    from fedbert_ds.client.limits import Limits
    from fedbert_ds.client.session import ClientOptions
    from fedbert_ds.config import Cut
    from fedbert_ds.wire.tls import TlsFiles


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one subcommand."""
    options = build_parser().parse_args(arguments)
    options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """Every subcommand with its options; the parsed `run` takes them and runs it."""
    parser = argparse.ArgumentParser(prog="fedbert-ds", description="Federated split pre-training of BERT.")
    parser.add_argument("--version", action="version", version=f"fedbert-ds {__version__}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_client(subcommands)
    _add_doctor(subcommands)
    _add_aggregator(subcommands)
    _add_merge(subcommands)
    _add_eval(subcommands)
    add_glue(subcommands)
    add_compare(subcommands)
    add_benches(subcommands)
    add_plan(subcommands)
    add_init(subcommands)
    add_vocab(subcommands)
    add_certs(subcommands)
    return parser


def _add_client(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser("client", help="take part in a run with your own text")
    _add_client_options(parser, needs_server=True)
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="print what the run would have you send, to whom, and what that gives away; then leave",
    )
    parser.add_argument("--managed", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_client)


def _add_doctor(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser("doctor", help="say what would stop a run here, at the server or at a client")
    parser.add_argument(
        "run_file", nargs="?", type=user_path, metavar="RUN_FILE", help="at the server: the run to start"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the run file")
    parser.add_argument("--ranks", type=int, metavar="N", help="of the server (default: one a GPU, or 1)")
    _add_client_options(parser.add_argument_group("at a client"), needs_server=False)
    parser.set_defaults(run=_doctor, inspect=True, managed=False)


def _add_client_options(parser: argparse._ActionsContainer, needs_server: bool) -> None:
    parser.add_argument(
        "--server",
        required=needs_server,
        type=expanded,
        metavar="HOST:PORT",
        help="the coordinator's address, or its file server.address",
    )
    _add_own_text(parser)
    parser.add_argument("--id", help="this client's name in the run (default: the certificate's, or the host name)")
    parser.add_argument(
        "--state", type=user_path, metavar="DIR", help="where to keep its tokens and its state (default: fedbert-ID)"
    )
    _add_conditions(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: accelerate's choice)")
    _add_connection(parser)


def _add_own_text(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        type=expanded,
        default=[],
        metavar="PATH",
        help=".txt/.jsonl/.parquet/.tokens files, folders, hub:NAME",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="X",
        help="share of your articles to keep out of training (default: the run's)",
    )
    parser.add_argument(
        "--task",
        default="masked_lm",
        metavar="NAME",
        help="what --data is read for, as task.name of the run (default: masked_lm)",
    )
    parser.add_argument(
        "--text-columns",
        nargs="+",
        default=[],
        metavar="NAME",
        help="column of tables with the text (default: text), of labelled ones with the one or two texts",
    )
    parser.add_argument("--label-column", metavar="NAME", help="column of labelled files with the label")
    parser.add_argument(
        "--encoding", metavar="NAME", help="of text files, cp1252 say (default: UTF-8, or what a file looks like)"
    )
    parser.add_argument(
        "--cache",
        type=expanded,
        metavar="DIR",
        help="where to keep your text as tokens for the next start (default: tokens/ in --state; off: in memory)",
    )


def _add_conditions(parser: argparse._ActionsContainer) -> None:
    """What a run must be, and may ask for, for this client to take part."""
    parser.add_argument(
        "--tokenizer", type=expanded, metavar="NAME", help="insist on this tokenizer (default: take the server's)"
    )
    parser.add_argument(
        "--model", type=expanded, metavar="NAME", help="insist on this model's shape (default: take the server's)"
    )
    parser.add_argument(
        "--cut", metavar="CUT", help="insist on this cut: embeddings, rows, whole, layers:K (default: any)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1 << 20, metavar="N", help="most tokens of yours in a window (default: 2^20)"
    )
    parser.add_argument(
        "--max-memory", type=float, metavar="GB", help="most memory of this process (default: 3/4 of the machine's)"
    )


def _add_connection(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--join-timeout", type=float, default=3600.0, metavar="S", help="seconds to wait for the others"
    )
    parser.add_argument("--connect-timeout", type=float, default=60.0, metavar="S", help="seconds to reach the server")
    parser.add_argument(
        "--rejoin-timeout", type=float, default=3600.0, metavar="S", help="seconds to wait for a server that is gone"
    )
    for name in ("ca", "certificate", "key"):
        parser.add_argument(f"--{name}", type=user_path, metavar="PEM", help=f"mutual TLS: {name}")
    parser.add_argument(
        "--plaintext", action="store_true", help="go without TLS beyond this machine, on a network nobody else is in"
    )


def _client(options: argparse.Namespace) -> None:
    # Imported here: a mistyped command must not wait for torch.
    from fedbert_ds.client.footprint import leave_out_unused, return_large_blocks

    leave_out_unused()
    return_large_blocks()
    be_quiet(os.environ)
    from fedbert_ds.client.session import inspect_run, run_client
    from fedbert_ds.folder_lock import keep_private
    from fedbert_ds.wire.tls import expiry_warning

    keep_private()
    client = _client_options(options)
    # Its launcher's own clients show the launcher's certificate.
    if client.tls is not None and not client.managed and (soon := expiry_warning(client.tls)) is not None:
        warn(soon)
    if options.inspect:
        print(inspect_run(client))
        return
    raise SystemExit(run_client(client))


def _doctor(options: argparse.Namespace) -> None:
    be_quiet(os.environ)
    from fedbert_ds.doctor.command import run_doctor

    run_doctor(options, _client_options)


def _client_options(options: argparse.Namespace) -> ClientOptions:
    """What a client is given; ConfigError for options that do not fit together."""
    from fedbert_ds.client.session import ClientOptions
    from fedbert_ds.wire.identity import TOKEN_VARIABLE
    from fedbert_ds.wire.tls import TlsFiles

    tls_files = (options.ca, options.certificate, options.key)
    if any(tls_files) and not all(tls_files):
        raise ConfigError("mutual TLS needs all of --ca, --certificate and --key; add what is missing")
    if options.held_out is not None and not 0.0 <= options.held_out < 1.0:
        raise ConfigError(f"--held-out {options.held_out}: a share of the text, at least 0 and less than 1")
    if not options.data and not options.inspect:
        raise ConfigError("--data: name the files or folders of your text")
    _check_task(options)
    tls = TlsFiles(*tls_files) if all(tls_files) else None
    name = _name(options, tls)
    return ClientOptions(
        server=options.server,
        data=tuple(options.data),
        name=name,
        state_folder=options.state or _state(name),
        tokenizer=options.tokenizer,
        model=options.model,
        cut=_cut(options.cut) if options.cut else None,
        tls=tls,
        # Of a launcher on this machine, which knows where it listens.
        plaintext=options.plaintext or options.managed,
        token=os.environ.pop(TOKEN_VARIABLE, ""),
        held_out=options.held_out,
        task=options.task,
        text_columns=tuple(options.text_columns),
        label_column=options.label_column,
        encoding=options.encoding,
        cache=_cache(options, name),
        device=options.device,
        join_timeout=options.join_timeout,
        connect_timeout=options.connect_timeout,
        rejoin_timeout=0.0 if options.managed else options.rejoin_timeout,
        managed=options.managed,
        limits=_limits(options),
    )


def _name(options: argparse.Namespace, tls: TlsFiles | None) -> str:
    """The client's name: the one in its certificate, if it has one, or what `--id` says."""
    from fedbert_ds.wire.identity import LONGEST_NAME, is_name

    name = options.id or socket.gethostname()
    # Its launcher's own clients show the launcher's certificate.
    if tls is not None and not options.managed:
        tls.read()
        own = tls.own_certificate().name
        if options.id and options.id != own:
            raise ConfigError(f"--id {options.id}: the certificate is that of {own}; drop --id, or show another")
        name = own
    if not is_name(name):
        raise ConfigError(
            f"--id {name}: a name is up to {LONGEST_NAME} letters, digits and .-_@+, and begins with a letter or digit"
        )
    return name


def _limits(options: argparse.Namespace) -> Limits:
    from fedbert_ds.client.limits import Limits, most_of_this_machine

    if options.max_tokens < 1:
        raise ConfigError(f"--max-tokens {options.max_tokens}: at least 1")
    if options.max_memory is None:
        return Limits(options.max_tokens, most_of_this_machine())
    if not 0.0 < options.max_memory < float("inf"):
        raise ConfigError(f"--max-memory {options.max_memory}: give gigabytes, more than 0")
    return Limits(options.max_tokens, int(options.max_memory * 1e9))


def _cache(options: argparse.Namespace, name: str) -> Path | None:
    """Folder for tokens; of a folder that several clients may be given, a part of its own."""
    if options.cache == "off":
        return None
    return Path(options.cache, name, "tokens") if options.cache else (options.state or _state(name)) / "tokens"


def _state(name: str) -> Path:
    return Path(f"fedbert-{name}")


def _check_task(options: argparse.Namespace) -> None:
    from fedbert_ds.config import TASK_NAMES

    if options.task not in TASK_NAMES:
        raise ConfigError(f"--task {options.task}: choose {', '.join(TASK_NAMES)}")
    if options.task == "masked_lm" and options.label_column:
        raise ConfigError("--label-column is for labelled files; add --task")
    if len(options.text_columns) > (1 if options.task in ("masked_lm", "token_classification") else 2):
        raise ConfigError(f"--text-columns {' '.join(options.text_columns)}: {options.task} reads fewer; drop one")


def _cut(text: str) -> Cut:
    from fedbert_ds.config import LayersCut

    kind, _, layers = text.partition(":")
    names: dict[str, Cut] = {"embeddings": "embeddings", "rows": "rows", "whole": "whole"}
    if text in names:
        return names[text]
    if kind == "layers" and layers.isdecimal() and int(layers) > 0:
        return LayersCut(layers=int(layers))
    raise ConfigError(f"--cut {text}: choose embeddings, rows, whole or layers:K")


def _add_aggregator(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "aggregator", help="own the client model of a run, as another party than the server"
    )
    parser.add_argument(
        "--config", type=user_path, required=True, metavar="FILE", help="run file with section aggregator"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the client models saved in its folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the run file")
    parser.set_defaults(run=_aggregator)


def _aggregator(options: argparse.Namespace) -> None:
    import signal

    tell_of_handshakes(os.environ)
    from fedbert_ds.aggregator.process import run_aggregator
    from fedbert_ds.folder_lock import keep_private
    from fedbert_ds.run_file import load_config

    keep_private()
    # What counts is on disk: a stop needs no farewell.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise SystemExit(run_aggregator(load_config(options.config, options.overrides, needs_body=False), options.resume))


def _add_merge(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser("merge", help="join the halves that server and aggregator wrote to a model")
    parser.add_argument("--body", type=user_path, required=True, metavar="DIR", help="the server's folder: RUN/body")
    parser.add_argument(
        "--client-model",
        type=user_path,
        required=True,
        metavar="FILE",
        help="the aggregator's client_model.safetensors",
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="a new Hugging Face folder")
    parser.set_defaults(run=_merge)


def _merge(options: argparse.Namespace) -> None:
    from fedbert_ds.model.halves import merge_folders

    merge_folders(options.body, options.client_model, options.out)
    print(f'model   {options.out}   a transformers checkpoint: AutoModelForMaskedLM.from_pretrained("{options.out}")')


def _add_eval(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "eval", help="held-out loss of any Hugging Face masked LM, or of a fine-tuned model"
    )
    parser.add_argument("--model", required=True, type=expanded, metavar="DIR", help="folder or hub name")
    parser.add_argument("--data", required=True, nargs="+", type=expanded, metavar="PATH", help="text, as for a client")
    parser.add_argument("--seed", type=int, default=0, help="masking seed; the same seed gives the same number")
    parser.add_argument("--batch-size", type=int, default=16, help="longest sequences at once; more of shorter ones")
    parser.add_argument("--device", help="cpu, cuda (all GPUs, with --workers), cuda:1, ... (default: a GPU if any)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, each with the model")
    parser.add_argument("--text-columns", nargs="+", default=[], metavar="NAME", help="of a fine-tuned model's files")
    parser.add_argument("--label-column", metavar="NAME", help="of a fine-tuned model's files")
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> None:
    for name in ("batch_size", "workers"):
        if (value := getattr(options, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")
    from fedbert_ds.evaluation.labelled import evaluate_task, is_fine_tuned
    from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

    if is_fine_tuned(options.model):
        told = evaluate_task(
            options.model,
            options.data,
            text_columns=options.text_columns,
            label_column=options.label_column,
            batch_size=options.batch_size,
            device=options.device,
        )
        print(f"loss {told.loss:.4f}, {', '.join(f'{name} {value:.4f}' for name, value in told.measures.items())}")
        print(f"{told.labels:,} labels in {told.examples:,} examples")
        return
    result = evaluate_masked_lm(
        options.model,
        options.data,
        seed=options.seed,
        batch_size=options.batch_size,
        device=options.device,
        workers=options.workers,
        shows_progress=True,
    )
    print(f"masked-LM loss {result.loss:.4f} nats, perplexity {result.perplexity:.2f}")
    print(f"{result.masked_tokens:,} masked tokens in {result.sequences:,} sequences, masking seed {options.seed}")


if __name__ == "__main__":
    main()
