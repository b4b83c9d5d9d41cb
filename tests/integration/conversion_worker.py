"""A rank of test_conversion.py: trains, saves, loads bodies at every ZeRO stage; one import.

    python conversion_worker.py FOLDER save|load

`save` writes a checkpoint of every case, and what it holds by parameter; `load` loads each of them
at every stage, and writes the same.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ZERO = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
STAGES = (0, 1, 2, 3)
WINDOW = 2


class Case(NamedTuple):
    """How a body is saved or loaded."""

    optimizer: str
    precision: str
    stage: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


CASES = [Case(*case) for case in itertools.product(("adamw", "lamb", "sgd"), ("fp32", "bf16"), STAGES)]


def build(case: Case) -> Any:
    """A small body whose parameters do not divide evenly among ranks."""
    from fedbert_ds.config import parse_config
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.server.body.engine import BodyEngine

    tree = {
        "model": {
            "hidden_size": 6, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 7,
            "max_position_embeddings": 16, "dropout": 0.0,
        },
        "data": {"sequence_length": 12},
        "body": {"deepspeed": str(ZERO / f"zero{case.stage}.json"), "precision": case.precision},
        "optimizer": {"name": case.optimizer},
    }  # fmt: skip
    config = parse_config(tree, "conversion")
    model = build_model(config.model, 30, 0, 1)
    _, body = split(model, config.cut)
    return BodyEngine.build(body, config.body, config.optimizer, config.kernels, torch.device("cpu"))


def train(engine: Any, window: int) -> Tensor:
    """One window, of which each of two ranks does half and one rank all; returns what the body
    answered to the first half, [2, 6].
    """
    from fedbert_ds.server.body.engine import BodyInput

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    answers = []
    for half in range(2) if ranks == 1 else (rank,):
        drawn = torch.Generator().manual_seed(10 * window + half)
        positions, bounds = torch.tensor([1, 3]), torch.tensor([0, 6], dtype=torch.int32)
        body_input = BodyInput(torch.randn(6, 6, generator=drawn), positions, bounds, None, 3)
        answers.append(engine.forward(half, body_input).result()[0])
        engine.backward(half, torch.randn(2, 6, generator=drawn), half == 1 or ranks > 1).result()
    engine.step(0.01)
    return answers[0]


def content(engine: Any) -> dict[str, dict[str, Tensor]]:
    """By parameter: fp32 weights, what the module computes with, moments and steps. As DeepSpeed
    itself tells them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine._engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    result: dict[str, dict[str, Tensor]] = {}
    masters = engine._unpartitioned_masters()
    computed = whole_module(engine)
    for name, parameter in engine._engine.module.named_parameters():
        if engine._stage == 0:
            master = masters[parameter]
            moments = {key: value for key, value in base.state[master].items() if key.startswith("exp")}
        else:
            master = safe_get_full_fp32_param(parameter)
            keys = [key for state in base.state.values() for key in state if key.startswith("exp")]
            if engine._stage < 3:
                # DeepSpeed links them once, and a load cuts that again.
                optimizer._hp_optimizer_states_linked = False
                optimizer._lazy_init_hp_params_optimizer_state()
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in sorted(set(keys))}
        values = {"weights": master, "computed": computed[name], **moments}
        steps = {float(state["step"]) for state in base.state.values() if "step" in state}
        assert len(steps) <= 1, steps
        for step in steps:
            values["step"] = torch.tensor(step)
        result[name] = {key: value.detach().clone().reshape(-1) for key, value in values.items()}
    return result


def whole_module(engine: Any) -> dict[str, Tensor]:
    """The module's own weights, gathered."""
    import deepspeed

    parameters = dict(engine._engine.module.named_parameters())
    if engine._stage < 3:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def main() -> None:
    """One rank; both phases begin and end a process group of their own."""
    from fedbert_ds.server.body.distributed import initialize, shut_down

    folder, phase = Path(sys.argv[1]), sys.argv[2]
    saved_by = int(os.environ.get("SAVED_BY", "2"))
    initialize()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results: dict[str, Any] = {}
    for case in CASES:
        if phase == "save":
            engine = build(case)
            for window in range(WINDOW):
                train(engine, window)
            engine.save(folder / f"{case} by {ranks}", WINDOW)
            results[str(case)] = content(engine), train(engine, WINDOW)
            continue
        for stage in STAGES:
            engine = build(case._replace(stage=stage))
            engine.load(folder / f"{case} by {saved_by}", WINDOW, saved_by, case.stage)
            results[f"{case} to {stage}"] = content(engine), train(engine, WINDOW)
            engine.load(folder / f"{case} by {saved_by}", WINDOW, saved_by, case.stage)
            results[f"{case} to {stage}, again"] = content(engine), None
    if rank == 0:
        torch.save(results, folder / f"{phase} by {ranks} of {saved_by}.pt")
    shut_down()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
