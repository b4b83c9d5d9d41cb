"""Real runs whose last clients lie: a rank and ten clients, forked from this process."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.liars.lies import LIES, liar
from fedbert_ds.bench.process import LONGEST_SECONDS
from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.masking import encode
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.errors import RunError, ServerAway
from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm
from fedbert_ds.run_file import load_config
from fedbert_ds.server.prepare import prepare_text
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.metrics import read_metrics
from fedbert_ds.wire.address_file import look_up

RUN_FILE = Path(__file__).with_name("run.yaml")
CLIENTS = 10
ASSUMED = 3

WHOLE = ("cut=whole", "federation.mode=parallel", "federation.average_every=2")
MODES: dict[str, tuple[str, ...]] = {"synchronous": ("federation.mode=synchronous",), "whole": WHOLE}
COMBINE: dict[str, tuple[str, ...]] = {
    "mean, no bound": ("federation.bound=null",),
    "mean": ("federation.bound=4",),
    "median": ("federation.combine=median",),
    "trimmed_mean": ("federation.combine=trimmed_mean", f"federation.assumed_liars={ASSUMED}"),
    "krum": ("federation.combine=krum", f"federation.assumed_liars={ASSUMED}"),
    "norm_clipping": ("federation.combine=norm_clipping",),
}


@dataclass(frozen=True)
class Case:
    """What one row is measured with."""

    mode: str
    combine: str
    liars: int
    lie: str

    @property
    def slug(self) -> str:
        """A folder name."""
        return "-".join([self.mode, *self.combine.replace(",", "").split(), str(self.liars), self.lie])


def prepare(work: Path, overrides: tuple[str, ...]) -> RunFolder:
    """The clients' shards, the held-out text and the tokenizer of all runs."""
    folder = RunFolder(work / "text")
    config = load_config(RUN_FILE, [*overrides, f"run.directory={folder.path}"])
    prepare_text(config, folder)
    return folder


def measure(case: Case, work: Path, text: RunFolder, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train one case, and its row. RunError names the log of what failed."""
    folder = work / case.slug
    more = [*overrides, *MODES[case.mode], *COMBINE[case.combine], "clients.local=0"]
    more += [f"run.directory={folder}", f"tokenizer.path={text.tokenizer}"]
    config = load_config(RUN_FILE, more)
    names = sorted(path.parent.name for path in text.clients.glob("*/shard.jsonl"))
    began = time.monotonic()
    _train(config, folder, {name: text.clients / name / "shard.jsonl" for name in names}, case)
    metrics = read_metrics(RunFolder(folder).metrics)
    return {
        "mode": case.mode, "combine": case.combine, "liars": case.liars, "lie": case.lie,
        "held_out_loss": held_out_loss(config, text), "told_loss": metrics[-1].loss,
        "bounded": sum(window.bounded for window in metrics), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def held_out_loss(config: RunConfig, text: RunFolder) -> float | None:
    """Of the run's model on the text that no client has, nats; None if the model is not finite."""
    result = evaluate_masked_lm(
        RunFolder(config.run.directory).model,
        [str(text.held_out)],
        seed=config.run.seed,
        mask_probability=config.data.mask_probability,
        sequence_length=config.data.sequence_length,
    )
    return result.loss if result.loss == result.loss else None


def unigram_loss(text: RunFolder, overrides: tuple[str, ...]) -> float:
    """Of word frequency alone, nats: as far as a model comes that has learned nothing else."""
    config = load_config(RUN_FILE, list(overrides))
    tokenizer = load_tokenizer(str(text.tokenizer))
    shards = sorted(str(path) for path in text.clients.glob("*/shard.jsonl"))
    counts = encode(read_articles(shards), tokenizer, config.data.sequence_length).token_counts(len(tokenizer)).double()
    held_out = encode(read_articles([str(text.held_out)]), tokenizer, config.data.sequence_length)
    wanted = held_out.token_counts(len(tokenizer)).double()
    share = (counts + 1.0) / (counts + 1.0).sum()
    return float(-(wanted * share.log()).sum() / wanted.sum())


def _train(config: RunConfig, folder: Path, shards: dict[str, Path], case: Case) -> None:
    # From a process that has neither threads nor gRPC yet, which do not mix with fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedbert_ds.server.serve", "fedbert_ds.client.session"])
    log = folder.with_suffix(".log")
    liars = sorted(shards)[len(shards) - case.liars :]
    processes = [context.Process(target=_rank, args=(config, log), daemon=True)]
    for name, shard in shards.items():
        lie = case.lie if name in liars else None
        processes.append(context.Process(target=_client, args=(folder, name, shard, lie, log), daemon=True))
    for process in processes:
        process.start()
    deadline = time.monotonic() + LONGEST_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
    if processes[0].exitcode != 0:
        raise RunError(f"{case.slug} ended with code {processes[0].exitcode}; see {log}")


def _logged(log: Path) -> Any:
    file = log.open("a", encoding="utf-8", buffering=1)
    os.dup2(file.fileno(), sys.stderr.fileno())
    return redirect_stdout(file)


def _rank(config: RunConfig, log: Path) -> None:
    from fedbert_ds.server.body.distributed import initialize, shut_down
    from fedbert_ds.server.serve import serve
    from fedbert_ds.telemetry import report

    report.draw_loss = lambda path, *_: path.write_bytes(b"")
    with _logged(log):
        initialize()
        serve(config, resume=False)
        shut_down()


def _client(folder: Path, name: str, shard: Path, lie: str | None, log: Path) -> None:
    from fedbert_ds.client import session

    if lie is not None:
        session.ClientTrainer = liar(session.ClientTrainer, LIES[lie])  # type: ignore[misc, assignment]
    with _logged(log):
        options = session.ClientOptions(
            server=_address(folder), data=(str(shard),), name=name, state_folder=folder / "states" / name, device="cpu"
        )
        session.run_client(options)


def _address(folder: Path) -> str:
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        with suppress(ServerAway):
            return look_up(str(folder / "server.address"))
        time.sleep(0.05)
    raise SystemExit(f"{folder}: no server came up")
