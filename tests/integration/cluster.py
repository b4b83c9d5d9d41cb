"""Real rank and client processes for a list of runs; plain PyTorch training on the same text."""

from __future__ import annotations

import math
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from integration.processes import start
from integration.worker import run_aggregator, run_client, run_rank
from torch import Tensor

from fedbert_ds.client.own_data import read_own_data
from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.labelled import LabelledStream
from fedbert_ds.data.masking import Batch, BatchStream, SequenceStream, encode
from fedbert_ds.data.shards import write_shard
from fedbert_ds.data.tokenizer import load_tokenizer, train_wordpiece
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.model.architecture import layers_of
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.queue.seats import window_shares
from fedbert_ds.tasks.registry import task_of_section
from fedbert_ds.tasks.rows import read_rows

WORLD_SIZE = 2
CLIENTS = {"ada": 9, "bo": 5, "cy": 2}
"""Three clients and their numbers of articles: unequal shards."""
WINDOWS = 5
Calls = Mapping[str, tuple[Callable[..., None], list, dict]]
"""By process: what it calls, with what arguments and environment variables."""
ZERO = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"


def write_text(folder: Path, clients: Mapping[str, int] = CLIENTS) -> dict[str, str]:
    """Write made-up articles of unequal length and a tokenizer. Returns data paths by client."""
    words = random.Random(7)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    vocabulary = ["".join(words.choices(syllables, k=words.randint(1, 4))) for _ in range(400)]
    paths, everything = {}, []
    for client, count in clients.items():
        articles = [
            Article(f"{client} {number}", " ".join(words.choices(vocabulary, k=words.randint(20, 90))))
            for number in range(count)
        ]
        everything += articles
        paths[client] = str(folder / f"{client}.jsonl")
        write_shard(Path(paths[client]), articles)
    train_wordpiece(everything, 300).save_pretrained(folder / "tokenizer")
    return paths


def aggregator_section(folder: Path) -> dict[str, str]:
    """An aggregator of another party: a port that nobody else takes, and a secret."""
    (folder / "secret").write_text("a secret of two parties")
    while True:
        # Not one that systems give to whoever asks for any.
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return {"address": f"127.0.0.1:{port}", "secret": str(folder / "secret")}


def run_file(folder: Path, name: str, **sections: Mapping) -> dict:
    """A run file for the test federation: one second, several micro-batches in flight."""
    tree: dict = {
        "run": {"directory": str(folder / name), "windows": WINDOWS, "save_every": 1000, "seed": 3},
        "model": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "dropout": 0.0,
                  "max_position_embeddings": 40},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"sequence_length": 32},
        "window": {"tokens": 700, "tokens_per_micro_batch": 96, "micro_batches_in_flight": 3},
        "optimizer": {"lr": 0.01, "warmup_windows": 2, "gradient_clipping": 0.0},
        "body": {"deepspeed": str(ZERO / "zero2.json")},
        "clients": {"expected": 3, "local": 0, "join_timeout": 60, "silence_timeout": 60},
        "server": {"port": 0},
    }  # fmt: skip
    for section, values in sections.items():
        tree[section] = (
            {**tree.get(section, {}), **values} if isinstance(values, Mapping) and section != "cut" else values
        )
    return tree


def run_jobs(folder: Path, jobs: Sequence[dict], timeout: float = 600.0) -> None:
    """Run the jobs one after another in 2 rank processes, one for each client with data, and one of
    an aggregator where a job has one.

    A failure shows the processes' output.
    """
    others = {"aggregator": (run_aggregator, [jobs], {})} if any("aggregator" in job["config"] for job in jobs) else {}
    clients = {client: (run_client, [jobs, client], {}) for client in jobs[0]["data"]}
    _run(folder, others | _ranks(WORLD_SIZE, run_rank, [jobs]) | clients, timeout)


def run_ranks(folder: Path, num: int, target: Callable[..., None], arguments: list, timeout: float) -> None:
    """Call `target` in so many rank processes. A failure shows their output."""
    _run(folder, _ranks(num, target, arguments), timeout)


def _ranks(num: int, target: Callable[..., None], arguments: list) -> Calls:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1]}
    return {f"rank {rank}": (target, arguments, {"RANK": rank, "LOCAL_RANK": rank} | common) for rank in range(num)}


def _run(folder: Path, calls: Calls, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with _processes(folder, calls) as processes:
        # Where one fails, others may wait for it: look at all of them.
        while running := [process for process in processes.values() if process.exitcode is None]:
            ready = wait([process.sentinel for process in running], deadline - time.monotonic())
            failed = {name: process.exitcode for name, process in processes.items() if process.exitcode}
            assert not failed, f"exit codes {failed}:\n{_output(folder, processes)}"
            assert ready, f"not all ended in {timeout} s:\n{_output(folder, processes)}"


@contextmanager
def _processes(folder: Path, calls: Calls) -> Iterator[dict[str, BaseProcess]]:
    processes = {}
    try:
        for name, (target, arguments, variables) in calls.items():
            variables = {"OMP_NUM_THREADS": 1, **variables}
            processes[name] = start(target, arguments, variables, folder / f"{name}.log")
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _output(folder: Path, names: Iterable[str]) -> str:
    return "\n".join(f"--- {name}\n{(folder / f'{name}.log').read_text(errors='replace')[-3000:]}" for name in names)


class Centralized:
    """Plain single-process training of the unsplit model on the sequences of each window's
    participants.
    """

    def __init__(self, tree: dict, data: Mapping[str, str]) -> None:
        self.config: RunConfig = parse_config(tree, "test")
        tokenizer = load_tokenizer(self.config.tokenizer.path)
        self.task = task_of_section(self.config.task)
        self.model = build_model(
            self.config.model, len(tokenizer), tokenizer.pad_token_id, self.config.run.seed, self.task
        ).train()
        owned = {client: read_own_data([path], self.config.task.name) for client, path in data.items()}
        sizes = {client: own.num_characters for client, own in owned.items()}
        strategy = strategy_of_run(self.config)
        participants = strategy.num_participants(len(data))
        self.shares = window_shares(
            sizes, self.config.window.tokens, self.config.window.share, participants, self.config.window.largest_share
        )
        self.sampler = strategy.sampler(self.config.run.seed, dict.fromkeys(data, 0))
        self.streams = {client: self._stream(tokenizer, client, path) for client, path in data.items()}
        self.gradient_norms: list[float] = []
        """Of the whole gradient, before it is clipped, of each window."""
        self.input_gradients: dict[tuple[str, int], list[Tensor]] = {}
        """By (client, window): d(loss)/d(tensor at the cut) for each sequence, [length, width]."""

    def _stream(self, tokenizer: Any, client: str, path: str) -> SequenceStream:
        length, seed = self.config.data.sequence_length, self.config.run.seed
        if self.task is None:
            return BatchStream(
                encode(read_articles([path]), tokenizer, length), tokenizer,
                mask_probability=self.config.data.mask_probability, whole_word=False, seed=seed, client=client,
            )  # fmt: skip
        examples = [self.task.example(row, self.task.columns, where) for where, row in read_rows([path])]
        return LabelledStream(self.task.encode(examples, tokenizer, length), seed=seed, client=client)

    def train(self) -> dict[str, Tensor]:
        """Train all windows and return the final state dict."""
        optimizer = build_optimizer(list(self.model.named_parameters()), self.config.optimizer)
        for window in range(self.config.run.windows):
            batches = {
                client: stream.next_batch(window, self.shares[client])
                for client, stream in self.streams.items()
                if self.sampler.takes_part(client, window)
            }
            self._accumulate(window, batches)
            clipping = self.config.optimizer.gradient_clipping
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clipping or math.inf)
            self.gradient_norms.append(float(norm))
            for group in optimizer.param_groups:
                group["lr"] = self.config.optimizer.learning_rate(window, self.config.run.windows)
            optimizer.step()
            optimizer.zero_grad()
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def _accumulate(self, window: int, batches: Mapping[str, Batch]) -> None:
        masked_tokens = sum(len(batch.labels) for batch in batches.values())
        for client, batch in batches.items():
            ids = list(batch.input_ids.split(batch.lengths))
            labels = torch.full_like(batch.input_ids, -100)
            labels[batch.masked_positions] = batch.labels.long()
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            targets = torch.nn.utils.rnn.pad_sequence(
                list(labels.split(batch.lengths)), batch_first=True, padding_value=-100
            )
            lengths = torch.tensor(batch.lengths)
            mask = torch.arange(padded.shape[1]) < lengths[:, None]
            crossing: list[Tensor] = []
            hook = self._crossing_module().register_forward_hook(
                lambda _, __, output, crossing=crossing: crossing.append(output)
            )
            given = {"input_ids": padded, "attention_mask": mask.long()}
            if batch.token_types is not None and getattr(self.model.config, "type_vocab_size", 1) > 1:
                kinds = list(batch.token_types.split(batch.lengths))
                given["token_type_ids"] = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)
            if self.task is not None:
                # transformers' own loss, a mean over this client's labels.
                given["labels"] = batch.labels if self.task.reads_first_token else targets
            result = self.model(**given)
            hook.remove()
            output = crossing[0][0] if isinstance(crossing[0], tuple) else crossing[0]
            output.retain_grad()
            if self.task is not None:
                loss = result.loss * len(batch.labels)
            else:
                scores = result.logits.flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum")
            (loss / masked_tokens).backward()
            self.input_gradients[client, window] = [
                output.grad[row, :length].clone() for row, length in enumerate(batch.lengths)
            ]

    def _crossing_module(self) -> torch.nn.Module:
        base = self.model.base_model
        if self.config.cut == "rows":
            return self.model.get_input_embeddings()
        if self.config.cut == "embeddings":
            return base.embeddings
        return layers_of(base, self.model.config)[self.config.cut.layers - 1]
