"""Two ranks step bodies at every ZeRO stage, and note what crosses between them.

    python step_worker.py FOLDER [counts]      (MASTER_ADDR and MASTER_PORT in the environment)

Writes `counts-RANK.json`, by "stage-optimizer-layers", and, unless told `counts`,
`weights-RANK.pt`.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from forked_ranks import run_two

WIDTH, TOKENS, WINDOWS, MICRO_BATCHES = 16, 40, 2, 2
RATE = 0.5
STAGES, OPTIMIZERS, PRECISIONS = (0, 1, 2, 3), ("adamw", "lamb", "muon"), ("fp32", "bf16")
MANY = 512
OFFLOADED = {
    "moments at 2": (2, ["offload_optimizer"]),
    "moments at 3": (3, ["offload_optimizer"]),
    "weights at 3": (3, ["offload_optimizer", "offload_param"]),
}
"""Case -> the stage, and what lies on the CPU."""


class Noted(TorchDispatchMode):
    """What is called inside: collectives with the bytes of their tensors, and all that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.collectives.append((operation.name().partition("::")[2], sum(tensor.nbytes for tensor in tensors)))
        elif not operation.is_view and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            self.operations += 1
        return operation(*args, **(kwargs or {}))


def run_rank(rank: int, folder: Path) -> None:
    from fedbert_ds.server.body.distributed import initialize, shut_down

    initialize()
    counts = {
        f"{stage}-{name}-{layers}": count(folder, rank, stage, name, layers)
        for stage in STAGES
        for name in OPTIMIZERS
        for layers in (2, 4)
    }
    (folder / f"counts-{rank}.json").write_text(json.dumps(counts))
    if sys.argv[2:] == ["counts"]:
        shut_down()
        return
    weights: dict[str, dict[str, Tensor]] = {}
    for stage, precision, name in itertools.product(STAGES, PRECISIONS, ("lamb", "muon")):
        engine = build(folder, rank, stage, name, precision)
        for window in range(WINDOWS):
            train(engine, window)
            engine.step(RATE)
            weights[f"{name}-{stage}-{precision}-{window}"] = engine.full_state()
    for case, (stage, offloaded) in OFFLOADED.items():
        engine = build(folder, rank, stage, "muon", "fp32", **{key: {"device": "cpu"} for key in offloaded})
        for window in range(WINDOWS):
            train(engine, window)
            engine.step(RATE)
        weights[f"offloaded-{case}"] = engine.full_state()
    for stage, number in itertools.product(STAGES, (1, MANY)):
        engine = build(folder, rank, stage, "sgd", "bf16", layers=1)
        window_of(engine, number)
        engine.step(RATE)
        weights[f"{number}-{stage}"] = engine.full_state()
    torch.save(weights, folder / f"weights-{rank}.pt")
    shut_down()


def config_of(folder: Path, rank: int, stage: int, name: str, precision: str, layers: int, **zero: Any) -> Any:
    """Of a small body."""
    from fedbert_ds.run_file import parse_config

    path = folder / f"zero-{rank}.json"
    # At stage 3 each layer is gathered by itself.
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_prefetch_bucket_size": 0, **zero}}))
    model = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": layers, "dropout": 0.0}
    return parse_config(
        {
            "model": model | {"intermediate_size": 24, "max_position_embeddings": TOKENS},
            "data": {"sequence_length": TOKENS},
            "optimizer": {"name": name, "lr": RATE, "weight_decay": 0.0, "gradient_clipping": 0.0},
            "body": {"deepspeed": str(path), "precision": precision},
        },
        "step",
    )


def body_of(config: Any) -> Any:
    """The same for every rank, stage and precision."""
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split

    _, body = split(build_model(config.model, 50, 0, 1), "embeddings")
    for parameter in body.parameters():
        parameter.data = parameter.data.bfloat16().float()  # which bf16 need not round
    return body


def build(folder: Path, rank: int, stage: int, name: str, precision: str, layers: int = 2, **zero: Any) -> Any:
    """The engine around it."""
    from fedbert_ds.server.body.engine import BodyEngine

    config = config_of(folder, rank, stage, name, precision, layers, **zero)
    return BodyEngine.build(body_of(config), config.body, config.optimizer, config.kernels, torch.device("cpu"))


def micro_batch(window: int, rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Activations and the gradient of all hidden states, both [tokens, width]."""
    drawn = torch.Generator().manual_seed(1000 * window + 100 * rank + number)
    return torch.randn(TOKENS, WIDTH, generator=drawn), torch.randn(TOKENS, WIDTH, generator=drawn)


def train(engine: Any, window: int) -> None:
    """All forwards and backwards of a window."""
    for number in range(MICRO_BATCHES):
        values, gradient = micro_batch(window, torch.distributed.get_rank(), number)
        one(engine, number, values, gradient)


def window_of(engine: Any, count: int) -> None:
    """A window of so many equal micro-batches, the sum of whose gradients does not depend on it."""
    values, gradient = micro_batch(0, torch.distributed.get_rank(), 0)
    for number in range(count):
        one(engine, number, values, gradient / count)


def one(engine: Any, number: int, values: Tensor, gradient: Tensor) -> None:
    from fedbert_ds.server.body.packed_input import BodyInput
    from fedbert_kernels.encoded import Encoded

    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    activations = Encoded.of(values, "fp32")
    engine.forward(number, BodyInput([activations], torch.arange(TOKENS), bounds, None, number)).result()
    engine.backward(number, [Encoded.of(gradient, "fp32")]).result()


def count(folder: Path, rank: int, stage: int, name: str, layers: int) -> dict[str, Any]:
    """Of the last window: collectives of forwards and backwards, and of the step; steps of the
    optimizer, and their operations; bytes of the body's fp32 gradient.
    """
    from fedbert_ds.server.body import engine as room

    made: list[Any] = []

    def noted_build(*arguments: Any, **options: Any) -> Any:
        made.append(build_optimizer(*arguments, **options))
        return made[0]

    build_optimizer = room.build_optimizer
    with mock.patch.object(room, "build_optimizer", noted_build):
        engine = build(folder, rank, stage, name, "bf16", layers)
    (inner,) = made
    calls: list[int] = []
    step = inner.step

    def noted_step() -> None:
        with Noted() as noted:
            step()
        calls.append(noted.operations)

    inner.step = noted_step
    for window in range(WINDOWS):
        calls.clear()
        with Noted() as before:
            train(engine, window)
        with Noted() as after:
            engine.step(RATE)
    size = 4 * sum(weight.numel() for weight in engine.full_state().values())
    return {"before": before.collectives, "step": after.collectives, "operations": calls, "bytes": size}


if __name__ == "__main__":
    run_two(run_rank, Path(sys.argv[1]))
