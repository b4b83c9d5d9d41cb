"""Trains a small body with compiled layers and without, at ZeRO 1.

    python compile_worker.py FOLDER

Writes `found.pt` into the folder: gradients of activations, final weights and recompiles of each
window, of either run. With a C++ compiler it is torch.compile as users have it, else all of it but
the machine code.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

WIDTH = 32
WINDOWS = ([([9, 7, 20], 5), ([50], 0)], [([8, 8, 8], 24), ([2], 0), ([64, 64, 11], 2)], [([1, 3, 30, 2], 7)])
"""Of each micro-batch of each window: sequence lengths, number of masked positions."""


def main(folder: Path) -> None:
    from fedbert_ds.model import compiled_layers
    from fedbert_ds.server.body.distributed import initialize, shut_down

    initialize()
    if shutil.which("g++") is None:
        whole = compiled_layers.compile_layers
        compiled_layers.compile_layers = lambda body: whole(body, backend="aot_eager")
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    found: dict[str, Any] = {}
    for name, is_compiled in (("plain", False), ("compiled", True)):
        before = compiled_layers.num_compiled()
        engine = build(folder / "zero.json", is_compiled)
        found["compiled before"] = compiled_layers.num_compiled() - before
        train(engine, name, found)
    layer = torch.compile(torch.nn.Linear(2, 2).double(), backend="aot_eager")
    layer(torch.zeros(2, 2, dtype=torch.float64))
    found["recompiles of a layer in fp64"] = engine.take_recompiles()
    torch.save(found, folder / "found.pt")
    shut_down()


def build(deepspeed: Path, is_compiled: bool) -> Any:
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.run_file import parse_config
    from fedbert_ds.server.body.engine import BodyEngine

    model = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 4, "dropout": 0.0}
    body = {"deepspeed": str(deepspeed), "compile": is_compiled}
    config = parse_config(
        {"model": model | {"initializer_range": 0.2}, "optimizer": {"name": "sgd", "lr": 0.5}, "body": body}, "compile"
    )
    _, built = split(build_model(config.model, 50, 0, 1), "embeddings")
    return BodyEngine.build(built, config.body, config.optimizer, config.kernels, torch.device("cpu"))


def train(engine: Any, name: str, found: dict[str, Any]) -> None:
    """All forwards of a window, then all its backwards, last one first."""
    from fedbert_ds.server.body.packed_input import BodyInput
    from fedbert_kernels.encoded import Encoded

    random = torch.Generator().manual_seed(0)
    gradients, recompiles = [], []
    for micro_batches in WINDOWS:
        for number, (lengths, num_masked) in enumerate(micro_batches):
            masked = torch.randperm(sum(lengths), generator=random)[:num_masked].sort().values
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            values = torch.randn(sum(lengths), WIDTH, generator=random)
            engine.forward(number, BodyInput([Encoded.of(values, "fp32")], masked, bounds, None, number))
        dummy = len(micro_batches)
        engine.forward(dummy, engine.dummy_input(WIDTH, False, 0))
        engine.backward(dummy, [Encoded.zeros(0, WIDTH, "fp32")])
        for number in reversed(range(dummy)):
            gradient = torch.randn(micro_batches[number][1], WIDTH, generator=random) / 10
            work = engine.backward(number, [Encoded.of(gradient, "fp32")])
            gradients.append(work.result()[0].decode())
        engine.step(0.5)
        recompiles.append(engine.take_recompiles())
    found |= {f"gradients {name}": gradients, f"weights {name}": engine.full_state(), f"recompiles {name}": recompiles}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
