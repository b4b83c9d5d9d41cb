"""Two ranks train small bodies that keep everything, or compute it again, at every ZeRO stage.

    python recompute_worker.py FOLDER      (MASTER_ADDR and MASTER_PORT in the environment)

Writes `STAGE-KERNELS-WHAT-RANK.pt` into the folder: weights after two windows, and input gradients
of their micro-batches. KERNELS is `torch`, or `fused`: the fused operators' bodies for the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from forked_ranks import LENGTHS, run_two

WIDTH = 32
KINDS = {"torch": ("none", "elementwise", "attention", "layers"), "fused": ("none", "elementwise", "attention")}


def run_rank(rank: int, folder: Path) -> None:
    from fedbert_ds.server.body.distributed import initialize, shut_down
    from fedbert_kernels import gelu, interpreter, layer_norm

    for module in (gelu, layer_norm):
        module.runs_triton = lambda tensor: False
    initialize()
    for stage in range(4):
        path = folder / f"zero-{rank}.json"
        # At stage 3 each layer is gathered by itself.
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_prefetch_bucket_size": 0}}))
        for kernels_name, whats in KINDS.items():
            for what in whats if kernels_name == "torch" or interpreter.HAVE_TRITON else ():
                torch.save(train(path, kernels_name, what), folder / f"{stage}-{kernels_name}-{what}-{rank}.pt")
    shut_down()


def train(deepspeed: Path, kernels_name: str, what: str) -> dict[str, torch.Tensor]:
    """Weights by name, and input gradients by window and micro-batch."""
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.run_file import parse_config
    from fedbert_ds.server.body.engine import BodyEngine
    from fedbert_ds.server.body.packed_input import BodyInput
    from fedbert_kernels.encoded import Encoded

    config = parse_config(
        {
            "model": {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2, "dropout": 0.2},
            "optimizer": {"lr": 0.01},
            "body": {"deepspeed": str(deepspeed), "precision": "bf16", "activation_checkpointing": what},
            "kernels": "triton" if kernels_name == "fused" else "torch",
        },
        "recompute",
    )
    _, body = split(build_model(config.model, 50, 0, 1), "embeddings")
    engine = BodyEngine.build(body, config.body, config.optimizer, config.kernels, torch.device("cpu"))
    results = {}
    for window in range(2):
        random = torch.Generator().manual_seed(1000 * window + torch.distributed.get_rank())
        gradients = []
        for number, lengths in enumerate(LENGTHS):
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            masked = torch.arange(0, sum(lengths), 2)
            gradients.append(Encoded.of(torch.randn(len(masked), WIDTH, generator=random), "fp32"))
            values = Encoded.of(torch.randn(sum(lengths), WIDTH, generator=random), "fp32")
            engine.forward(number, BodyInput([values], masked, bounds, None, 10 * window + number))
        # All were in flight at once; the last comes back first.
        for number in reversed(range(len(LENGTHS))):
            work = engine.backward(number, [gradients[number]])
            results[f"input {window} {number}"] = work.result()[0].decode()
        engine.step(config.optimizer.lr, client_norm=0.5)
    return results | engine.full_state()


if __name__ == "__main__":
    # So that `kernels: triton` can be had on a CPU; without Triton there are no fused runs.
    os.environ["TRITON_INTERPRET"] = "1"
    run_two(run_rank, Path(sys.argv[1]))
