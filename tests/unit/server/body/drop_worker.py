"""Two ranks train small bodies at every ZeRO stage and precision, with windows that are undone.

    python drop_worker.py FOLDER      (MASTER_ADDR and MASTER_PORT in the environment)

Writes `STAGE-PRECISION-KIND-RANK.pt` into the folder: the weights after three windows. KIND is
`plain`, or `dropped`: one window was undone after the first and two after the second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from forked_ranks import LENGTHS, run_two

WIDTH = 16


def run_rank(rank: int, folder: Path) -> None:
    from fedbert_ds.server.body.distributed import initialize, shut_down

    initialize()
    for stage in range(4):
        # At stage 3, partition and release even weights as small as these.
        settings = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0} if stage == 3 else {}
        path = folder / f"zero-{rank}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, **settings}}))
        for precision in ("fp32", "bf16"):
            for kind in ("plain", "dropped"):
                weights = train(path, precision, is_disturbed=kind == "dropped")
                torch.save(weights, folder / f"{stage}-{precision}-{kind}-{rank}.pt")
    shut_down()


def train(deepspeed: Path, precision: str, is_disturbed: bool) -> dict[str, torch.Tensor]:
    """Weights by name after three windows."""
    from fedbert_ds.config import parse_config
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.server.body.engine import BodyEngine

    config = parse_config(
        {
            "model": {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2},
            "optimizer": {"lr": 0.01},
            "body": {"deepspeed": str(deepspeed), "precision": precision},
        },
        "drop",
    )
    _, body = split(build_model(config.model, 50, 0, 1), "embeddings")
    engine = BodyEngine.build(body, config.body, config.optimizer, config.kernels, torch.device("cpu"))
    for window, num_undone in enumerate((0, 1, 2)):
        for attempt in range(num_undone if is_disturbed else 0):
            accumulate(engine, 100 + 10 * window + attempt)
            engine.drop_gradients()
        accumulate(engine, window)
        engine.step(config.optimizer.lr, client_norm=0.5)
    return engine.full_state()


def accumulate(engine, window: int) -> None:
    """Forwards and backwards of a window; its numbers follow from `window` and the rank alone."""
    from fedbert_ds.server.body.engine import BodyInput
    from fedbert_kernels.encoded import Encoded

    random = torch.Generator().manual_seed(1000 * window + torch.distributed.get_rank())
    for number, lengths in enumerate(LENGTHS):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        values = Encoded.of(torch.randn(sum(lengths), WIDTH, generator=random), "fp32")
        place = BodyInput([values], torch.arange(0, sum(lengths), 2), bounds, None, 10 * window + number)
        engine.forward(number, place)
    for number, lengths in enumerate(LENGTHS):
        gradient = torch.randn(len(range(0, sum(lengths), 2)), WIDTH, generator=random)
        engine.backward(number, [Encoded.of(gradient, "fp32")], is_last=number + 1 == len(LENGTHS)).result()


if __name__ == "__main__":
    run_two(run_rank, Path(sys.argv[1]))
