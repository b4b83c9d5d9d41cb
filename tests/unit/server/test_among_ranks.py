"""Two gloo ranks combine each other's updates as one process that has them all."""

from __future__ import annotations

import multiprocessing
import queue
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fedbert_ds.config import FederationSection
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.federation.combining import Combiner, OneProcess
from fedbert_ds.server.among_ranks import AmongRanks
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rank_messages import RankSecret

SHAPES = {"bias": (4,), "table": (3, 5)}
RULES = ("mean", "median", "trimmed_mean", "krum", "norm_clipping")
SECRET = "of the test"
RANK_OF = {"ada": 0, "bo": 1, "cy": 0, "di": 0, "liar": 1}
"""An interleaved order of names, and another number of clients on each rank."""


def updates() -> dict[str, ClientUpdate]:
    made = {}
    for number, client in enumerate(RANK_OF):
        random = torch.Generator().manual_seed(number)
        size = 1e4 if client == "liar" else 1.0
        tensors = {name: size * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
        made[client] = ClientUpdate(tensors, 10.0 + number)
    return made


def federation(rule: str) -> FederationSection:
    return FederationSection(combine=rule)  # type: ignore[arg-type]


def _rank(rank: int, store: str, answers: Any) -> None:
    timeout = timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    ranks = RankGroup(RankSecret(Path(store), {"FEDBERT_RANK_SECRET": SECRET}))
    mine = {client: update for client, update in updates().items() if RANK_OF[client] == rank}
    results = []
    for rule in RULES:
        for here in (mine, mine if rank else {}):  # then a rank without clients
            combiner = Combiner(federation(rule), SHAPES, AmongRanks(ranks), dict)
            combined = combiner.combine(here, average=False)
            results.append(({name: t.tolist() for name, t in combined.items()}, combiner.take_bounded()))
    answers.put((rank, results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = str(tmp_path_factory.mktemp("gloo") / "store")
    processes = [context.Process(target=_rank, args=(rank, store, answers), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return dict(answers.get(timeout=180) for _ in processes)
    except queue.Empty:
        pytest.fail(f"no answer; exit codes {[process.exitcode for process in processes]}")
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


@pytest.mark.parametrize("rule", RULES)
def test_ranks_combine_as_one_process_would(rule: str, two_ranks: dict[int, list[Any]]) -> None:
    for case, clients in enumerate((set(RANK_OF), {"bo", "liar"})):
        number = 2 * RULES.index(rule) + case
        (got, bounded_0), (other, bounded_1) = two_ranks[0][number], two_ranks[1][number]
        assert got == other, "both ranks get the same, bit for bit"
        mine = {client: update for client, update in updates().items() if client in clients}
        one_process = OneProcess(
            lambda here: [[here[c] for c in sorted(here) if RANK_OF[c] == rank] for rank in range(2)]
        )
        combiner = Combiner(federation(rule), SHAPES, one_process, dict)
        expected = combiner.combine(mine, average=False)
        assert got == {name: tensor.tolist() for name, tensor in expected.items()}
        # Each rank tells of its own clients, whoever's updates are typical.
        assert bounded_0 == [] and bounded_1 == combiner.take_bounded()
        assert [client for client, _ in bounded_1] == ([] if rule == "norm_clipping" else ["liar"])
