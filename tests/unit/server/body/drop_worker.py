"""Two ranks train small bodies at every ZeRO stage and precision, with windows that are undone.

    python drop_worker.py FOLDER      (MASTER_ADDR and MASTER_PORT in the environment)

Writes `STAGE-PRECISION-KIND-RANK.pt` into the folder: the weights after three windows. KIND is
`plain`, or `dropped`: one window was undone after the first and two after the second. With fp32 at
stage 0 also `spoilt`: a client's sequence in each micro-batch makes results that are not
finite, and is left out before the backward; or `zeros`: it was zeros from the start.
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
        for kind in ("zeros", "spoilt") if stage == 0 else ():
            weights = train(path, "fp32", is_disturbed=False, other=kind)
            torch.save(weights, folder / f"{stage}-fp32-{kind}-{rank}.pt")
    shut_down()


def train(deepspeed: Path, precision: str, is_disturbed: bool, other: str = "") -> dict[str, torch.Tensor]:
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
        accumulate(engine, window, other)
        engine.step(config.optimizer.lr, client_norm=0.5)
    assert not engine.lost_gradient
    weights = engine.full_state()
    if other == "spoilt":
        accumulate(engine, 7, other, left_out=False)
        engine.step(config.optimizer.lr)
        assert engine.lost_gradient and all(tensor.isfinite().all() for tensor in engine.full_state().values())
    return weights


def accumulate(engine, window: int, other: str = "", left_out: bool = True) -> None:
    """Forwards and backwards of a window; its numbers follow from `window` and the rank alone.

    With `other` each micro-batch has one more sequence, with values of that kind.
    """
    from fedbert_ds.server.body.engine import BodyInput
    from fedbert_kernels.encoded import Encoded

    random = torch.Generator().manual_seed(1000 * window + torch.distributed.get_rank())
    for number, lengths in enumerate(LENGTHS):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        tensor, masked = torch.randn(sum(lengths), WIDTH, generator=random), torch.arange(0, sum(lengths), 2)
        if other:
            tensor = torch.cat([tensor, torch.full((3, WIDTH), torch.inf if other == "spoilt" else 0.0)])
            masked = torch.cat([masked, torch.tensor([len(tensor) - 1])])
            bounds = torch.tensor([*bounds, len(tensor)]).int()
        place = BodyInput([Encoded.of(tensor, "fp32")], masked, bounds, None, 10 * window + number)
        hidden = engine.forward(number, place)
        assert not other or hidden.result()[0].is_finite == (other != "spoilt")
    for number, lengths in enumerate(LENGTHS):
        gradient = torch.randn(len(range(0, sum(lengths), 2)), WIDTH, generator=random)
        parts = [Encoded.of(gradient, "fp32")]
        if other:
            parts.append(Encoded.zeros(1, WIDTH, "fp32"))
        if other == "spoilt" and left_out:
            engine.blank(number, [slice(sum(lengths), sum(lengths) + 3)])
        of_inputs, _ = engine.backward(number, parts, is_last=number + 1 == len(LENGTHS)).result()
        assert not other or of_inputs.is_finite == (left_out or other != "spoilt")


if __name__ == "__main__":
    run_two(run_rank, Path(sys.argv[1]))
