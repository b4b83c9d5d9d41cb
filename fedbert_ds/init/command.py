"""`fedbert-ds init`: writes a run file for what there is, and says what to do next."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_ds.errors import ConfigError
from fedbert_ds.planner.options import add_machines
from fedbert_ds.user_path import user_path

if TYPE_CHECKING:
    from fedbert_ds.init.choices import Choice, Wanted
    from fedbert_ds.planner.derive import Machines

CPU_MEMORY = 8e9
"""Bytes that a rank without a GPU is taken to have."""
ONE_MACHINE = 10e9 / 8
"""Bytes a second between processes of one machine."""


def add_init(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `init` to the command line."""
    parser = subcommands.add_parser("init", help="write a run file for your machines, every value explained")
    parser.add_argument(
        "--size", default="base", metavar="NAME", help="tiny, mini, small, medium, base, large (BERT's)"
    )
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="owners of text (default: 4)")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="of the server; 0 trains on its CPU (default: 1)"
    )
    parser.add_argument("--hours", type=float, default=24.0, metavar="H", help="to train (default: 24)")
    parser.add_argument(
        "--host", default="body.example", metavar="NAME", help="of the server, as owners' machines look it up"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="hub name or folder (default: bert-base-uncased)")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="text to deal to clients on this machine: a try alone"
    )
    parser.add_argument("--out", type=user_path, default=Path("run.yaml"), metavar="FILE", help="(default: run.yaml)")
    add_machines(parser)
    parser.set_defaults(run=_init)


def _init(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise ConfigError(f"{options.out}: is there already; name another file with --out, or remove it")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: no such folder {options.out.parent}; make it, or name another")
    from fedbert_ds.init.choices import Wanted, choose
    from fedbert_ds.planner.plan import predict

    wanted = Wanted(
        size=options.size,
        clients=options.clients,
        gpus=options.gpus,
        hours=options.hours,
        name=options.out.stem,
        host=options.host,
        tokenizer=options.tokenizer,
        data=tuple(options.data),
    )
    machines = _machines(options)
    print("plan    the planner tries values: seconds, with a thousand clients some minutes", flush=True)
    choice = choose(wanted, lambda config: predict(config, machines, 1.0).tokens_per_second)
    text = written(choice, wanted)
    try:
        with open(options.out, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot be written: {error.strerror}; name another file") from error
    print(f"run     {options.out}   every value is explained in it; lines with DECIDE are yours")
    for line in next_steps(choice, wanted, options.out):
        print(line)


def written(choice: Choice, wanted: Wanted) -> str:
    """The run file's text."""
    from fedbert_ds.init.run_file import run_file

    there = f"{wanted.gpus} GPUs" if wanted.gpus else "a CPU"
    heading = [
        f"BERT-{wanted.size} with {wanted.clients} clients and {there}, for {wanted.hours:g} hours. "
        "Written by `fedbert-ds init`.",
        "All other keys have their defaults; fedbert_ds/config.py documents them. Check the file with "
        "`fedbert-ds doctor`, and predict it with `fedbert-ds plan` after a change.",
    ]
    if not wanted.data:
        heading.append("Yours to decide: text, which the owners bring; the tokenizer; the server's name; certificates.")
    return run_file(choice.tree, choice.reasons, heading)


def next_steps(choice: Choice, wanted: Wanted, out: Path) -> Sequence[str]:
    """Commands to run, in order."""
    ranks = f"--num_gpus {max(1, wanted.gpus)}"
    start = f"deepspeed {ranks} launchers/pretrain.py --config {out}"
    if wanted.data:
        return [f"check   fedbert-ds doctor {out}", f"start   {start}"]
    files = "--ca ca.pem --certificate hospital-a.pem --key hospital-a.key"
    client = f"--server {wanted.host}:{choice.config.server.port} --data notes/ {files}"
    return [
        "certs   fedbert-ds certs ca",
        f"        fedbert-ds certs server {wanted.host}",
        f"        fedbert-ds certs client hospital-a          # and so on for {wanted.clients} owners",
        f"check   fedbert-ds doctor {out}",
        f"start   {start}",
        f"owners  fedbert-ds doctor {client}",
        f"        fedbert-ds client {client}",
    ]


def _machines(options: argparse.Namespace) -> Machines:
    """What the planner is told; a rank on a CPU computes as fast as a client does."""
    from fedbert_ds.planner.command import machines_of

    if options.gpus < 0:
        raise ConfigError(f"--gpus {options.gpus}: a number of GPUs; 0 is for none")
    machines = machines_of(argparse.Namespace(**{**vars(options), "gpus": max(1, options.gpus)}))
    if not options.gpus:
        machines = replace(
            machines, gpu_flops=machines.client_flops, efficiency=1.0, gpu_memory=CPU_MEMORY, launch_per_layer=0.0
        )
    if options.data:
        # The machine's cores compute for all of its clients, and for the body if it has no GPU.
        share = machines.client_flops / (machines.clients + (not options.gpus))
        body = machines.gpu_flops if options.gpus else share
        machines = replace(machines, gpu_flops=body, client_flops=share, rtt=0.0, up=ONE_MACHINE, down=ONE_MACHINE)
    return machines
