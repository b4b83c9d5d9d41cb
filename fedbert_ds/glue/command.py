"""The options of `fedbert-ds glue`; torch is imported when it runs."""

from __future__ import annotations

import argparse

from fedbert_ds.user_path import expanded, user_path

QUICK_EXAMPLES = 64


def add_glue(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `glue` to the command line."""
    parser = subcommands.add_parser("glue", help="fine-tune a checkpoint on GLUE's tasks, several seeds, one table")
    parser.add_argument(
        "--model", required=True, type=expanded, metavar="DIR", help="checkpoint to start from: folder or hub name"
    )
    parser.add_argument(
        "--out", required=True, type=user_path, metavar="DIR", help="for results; finished ones are kept"
    )
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="DIR",
        help="GLUE's original files, TASK/train.tsv and so on (default: the hub)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="RTE, SST-2, ... (default: all but WNLI)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument(
        "--recipe",
        default="standard",
        metavar="NAME",
        help="standard: 6 %% warm-up, best epoch counts; run_glue: transformers' published one (default: standard)",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="(default: 3; MRPC and RTE 5)")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="(default: 2e-5)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences of a step (default: 32)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sequence at most (default: 128)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the computation (default: fp32)")
    parser.add_argument(
        "--from-mnli",
        nargs="?",
        const="",
        metavar="DIR",
        help="RTE, MRPC and STS-B also from this MNLI checkpoint (default: the MNLI run of the same seed)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: every GPU, or the CPU)")
    parser.add_argument("--workers", type=int, metavar="N", help="runs at once (default: one a GPU, or one)")
    parser.add_argument("--train-examples", type=int, metavar="N", help="train on so many, drawn once for all seeds")
    parser.add_argument("--quick", action="store_true", help="64 examples, one epoch: to see that it works")
    parser.set_defaults(run=_glue)


def _glue(options: argparse.Namespace) -> None:
    from fedbert_ds.errors import ConfigError, keeps_what_is_finished
    from fedbert_ds.glue.recipe import recipe_of
    from fedbert_ds.glue.run import DataSource
    from fedbert_ds.glue.study import OWN_MNLI, Study, run_study
    from fedbert_ds.tasks.glue_tasks import GLUE, glue_task
    from fedbert_ds.telemetry.record import command_line

    if options.train_examples is not None and options.train_examples < 1:
        raise ConfigError(f"--train-examples {options.train_examples}: must be 1 or more")
    names = [glue_task(name).name for name in options.tasks or GLUE]
    if len(set(names)) != len(names):
        raise ConfigError(f"--tasks {' '.join(options.tasks)}: name each once")
    recipes = {
        name: recipe_of(
            options.recipe,
            name,
            epochs=1 if options.quick else options.epochs,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            length=options.length,
            precision=options.precision,
        )
        for name in names
    }
    with keeps_what_is_finished():
        run_study(
            Study(
                model=options.model,
                out=options.out,
                recipes=recipes,
                seeds=options.seeds,
                source=DataSource(
                    options.data,
                    QUICK_EXAMPLES if options.quick else options.train_examples,
                    QUICK_EXAMPLES if options.quick else None,
                ),
                command=command_line(),
                from_mnli=OWN_MNLI if options.from_mnli == "" else options.from_mnli,
                device=options.device,
                workers=options.workers,
            )
        )
