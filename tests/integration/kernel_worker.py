"""Two ranks train the same body in torch and with Triton's kernels, interpreted, at ZeRO 2 and 3.

At stage 2 also as on a card where torch.compile's LayerNorm and GELU were faster.

    python kernel_worker.py FOLDER      (MASTER_ADDR and MASTER_PORT in the environment)

Writes `STAGE-KERNELS-RANK.pt` into the folder, and `modernbert-...` of a ModernBERT with windows:
weights after a window, and input gradients of all micro-batches.

Runs outside the tests' process, because kernels are interpreted or not from their
import on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from forked_ranks import LENGTHS, run_two


def run_rank(rank: int, folder: Path) -> None:
    """Train and write all runs of one rank."""
    from fedbert_ds.server.body.distributed import initialize, shut_down

    # On a CPU attention runs in torch; here the interpreted kernels replace it.
    from fedbert_kernels import attention

    attention.attention_torch.forward = attention.launch_forward
    attention.attention_torch.backward = attention.launch_backward
    initialize()
    for stage in (2, 3):
        path = folder / f"zero-{rank}.json"
        # At stage 3 each layer is gathered by itself.
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_prefetch_bucket_size": 0}}))
        for kernels in ("torch", "triton"):
            torch.save(train(path, kernels), folder / f"{stage}-{kernels}-{rank}.pt")
            modern = {"architecture": "modernbert", "local_attention": 6, "global_attention_every": 2}
            torch.save(train(path, kernels, modern), folder / f"modernbert-{stage}-{kernels}-{rank}.pt")
    beaten_by_torch_compile()
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    torch.save(train(path, "triton"), folder / f"2-compiled-{rank}.pt")
    shut_down()


def beaten_by_torch_compile() -> None:
    """From now on LayerNorm and GELU are torch.compile's, which makes all but machine code."""
    from fedbert_kernels import compiled_rows, gelu, layer_norm, patch_modules, row_choice

    def refuse(*_: object) -> None:
        raise AssertionError("this kernel was beaten")

    patch_modules.operator = lambda kernel, _: row_choice.operator(kernel, row_choice.COMPILED)
    compiled_rows.torch.compile = partial(torch.compile, backend="aot_eager")
    for module in (gelu, layer_norm):
        module.launch_forward = refuse


def train(deepspeed: Path, kernels: str, model: Mapping[str, Any] = MappingProxyType({})) -> dict[str, torch.Tensor]:
    """Train one window: weights by name, and input gradients by micro-batch; `model` are keys of
    the run file.
    """
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.run_file import parse_config
    from fedbert_ds.server.body.engine import BodyEngine
    from fedbert_ds.server.body.packed_input import BodyInput
    from fedbert_kernels.encoded import Encoded

    config = parse_config(
        {
            "model": {"hidden_size": 32, "num_attention_heads": 2, "dropout": 0.0, "initializer_range": 0.2}
            | dict(model),
            "optimizer": {"name": "sgd", "lr": 0.5},
            "body": {"deepspeed": str(deepspeed)},
            "kernels": kernels,
        },
        "kernels",
    )
    _, body = split(build_model(config.model, 50, 0, 1), "embeddings")
    engine = BodyEngine.build(body, config.body, config.optimizer, config.kernels, torch.device("cpu"))
    results = {}
    random = torch.Generator().manual_seed(torch.distributed.get_rank())
    for number, lengths in enumerate(LENGTHS):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        values = Encoded.of(torch.randn(sum(lengths), 32, generator=random), "fp32")
        engine.forward(number, BodyInput([values], torch.arange(0, sum(lengths), 2), bounds, None, number))
    for number, lengths in enumerate(LENGTHS):
        gradient = torch.randn(len(range(0, sum(lengths), 2)), 32, generator=random) / 10
        encoded, _ = engine.backward(number, [Encoded.of(gradient, "fp32")]).result()
        results[f"input {number}"] = encoded.decode()
    engine.step(config.optimizer.lr)
    return results | engine.full_state()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    run_two(run_rank, Path(sys.argv[1]))
