"""A rank's command line: check the run, then serve; what a launcher starts once per rank.

    python -m fedbert_ds.server.pretrain --config FILE [section.key=value ...] [--resume]

Without a launcher it is a run of one rank.
"""

from __future__ import annotations

import argparse
import os
import time

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import UserError, exit_with, of_system, print_everything
from fedbert_ds.run_file import load_config
from fedbert_ds.server.environment import check_numbers
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.user_path import user_path


def main() -> None:
    """Parse the command line, check the run (rank 0), then run this rank.

    A UserError is one line on standard error and its exit code.
    """
    print_everything()
    parser = argparse.ArgumentParser(description="Federated split pre-training: the server side.")
    parser.add_argument("--config", type=user_path, required=True, help="run file (YAML)")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.directory")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed passes it; LOCAL_RANK says the same
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the run file from here")
    options = parser.parse_intermixed_args()
    rank = 0
    try:
        check_numbers(os.environ)
        rank = int(os.environ.setdefault("RANK", "0"))
        config = load_config(options.config, options.overrides)
        _run(config, options.resume or is_restart(config), rank)
    except OSError as error:
        if (told := of_system(error, again="add --resume")) is None:
            raise
        exit_with(told)
    except UserError as error:
        if rank != 0:
            # Rank 0 reports a mistake that all ranks share; the launcher ends this one meanwhile.
            time.sleep(5)
        exit_with(error)


def is_restart(config: RunConfig) -> bool:
    """torchrun has started these ranks again, with the same command, after one was lost, and the
    run had begun.
    """
    return (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and RunFolder(config.run.directory).config.is_file()
    )


def _run(config: RunConfig, resume: bool, rank: int) -> None:
    from fedbert_ds.server.body.distributed import initialize, shut_down

    if rank == 0:
        from fedbert_ds.server.before_start import check_before_start

        check_before_start(config, resume)
    initialize()
    from fedbert_ds.server.serve import serve

    exit_code = serve(config, resume)
    shut_down()
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
