"""Many real clients in one process, each in a thread with its own text, half and connection.

    python -m fedbert_ds.bench.pipeline.load --server HOST:PORT --shards FOLDER --state FOLDER

They run the code of `fedbert-ds client`; one process saves the memory and the start of many.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

import torch

from fedbert_ds.bench.process import address_of
from fedbert_ds.client.session import ClientOptions, run_client
from fedbert_ds.errors import UserError
from fedbert_ds.user_path import user_path


def main() -> None:
    """Run one client for every file in --shards; ends when all have ended, with 1 if any failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True, help="- to read it from standard input, once it is known")
    parser.add_argument("--shards", type=user_path, required=True)
    parser.add_argument("--state", type=user_path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    server = address_of(options.server)
    failures: list[str] = []

    def run(shard: Path) -> None:
        try:
            run_client(
                ClientOptions(
                    server=server,
                    data=(str(shard),),
                    name=shard.stem,
                    state_folder=options.state / shard.stem,
                    device=options.device,
                )
            )
        except UserError as error:
            failures.append(f"{shard.stem}: {error}")

    threads = [threading.Thread(target=run, args=(shard,)) for shard in sorted(options.shards.glob("*.jsonl"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
