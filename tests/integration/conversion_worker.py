"""A rank of test_conversion.py: trains, saves, loads bodies at every ZeRO stage.

`save` writes a checkpoint of every case, and what it holds by parameter; `load` loads them at other
stages, and writes the same.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ZERO = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("adamw", "lamb", "sgd", "muon")
PRECISIONS = ("fp32", "bf16")
WINDOW = 2

Results = dict[str, tuple[dict[str, dict[str, Tensor]], Tensor | None]]
"""By case: what the body holds, and what it answered."""


class Case(NamedTuple):
    """How a body is saved or loaded."""

    optimizer: str
    precision: str
    stage: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


CASES = [Case(*case) for case in itertools.product(OPTIMIZERS, PRECISIONS, STAGES)]
RANKS = ((2, 2), (2, 1), (1, 2))
"""Ranks that save and that load."""


def loads(saved_by: int, ranks: int) -> list[tuple[Case, int]]:
    """What so many ranks load: a saved case and the stage to load it at.

    Each of RANKS goes from every stage to every other in fp32 and in bf16, with another optimizer
    than the next; Muon in one of the two.
    """
    turn = RANKS.index((saved_by, ranks))
    others = [name for name in OPTIMIZERS if name != "muon"]
    turns = [
        (Case(others[(turn + before + after + shift) % 3], precision, before), after)
        for before, after in itertools.product(STAGES, STAGES)
        for shift, precision in enumerate(PRECISIONS)
    ]
    return turns + [
        (Case("muon", PRECISIONS[(turn + before + after) % 2], before), after)
        for before, after in itertools.product(STAGES, STAGES)
    ]


def build(case: Case) -> tuple[Any, Any]:
    """A small body whose parameters do not divide evenly among ranks; DeepSpeed's engine in it."""
    import deepspeed

    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.run_file import parse_config
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
    made: list[Any] = []
    initialize = deepspeed.initialize

    def seen(**arguments: Any) -> Any:
        made.append(initialize(**arguments))
        return made[0]

    deepspeed.initialize = seen
    try:
        engine = BodyEngine.build(body, config.body, config.optimizer, config.kernels, torch.device("cpu"))
    finally:
        deepspeed.initialize = initialize
    return engine, made[0][0]


def train(engine: Any, window: int) -> Tensor:
    """One window, of which each of two ranks does half and one rank all; returns what the body
    answered to the first half, [2, 6].
    """
    from fedbert_ds.server.body.packed_input import BodyInput
    from fedbert_kernels.encoded import Encoded

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    answers = []
    for half in range(2) if ranks == 1 else (rank,):
        drawn = torch.Generator().manual_seed(10 * window + half)
        positions, bounds = torch.tensor([1, 3]), torch.tensor([0, 6], dtype=torch.int32)
        activations, gradient = (Encoded.of(torch.randn(rows, 6, generator=drawn), "fp32") for rows in (6, 2))
        body_input = BodyInput([activations], positions, bounds, None, 3)
        answers.append(engine.forward(half, body_input).result()[0].decode())
        engine.backward(half, [gradient]).result()
    engine.step(0.01)
    return answers[0]


def content(inner: Any, stage: int) -> dict[str, dict[str, Tensor]]:
    """By parameter, [elements]: fp32 weights, what the module computes with, moments and steps, as
    DeepSpeed's engine itself tells them.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    optimizer = inner.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    kept = {key for state in base.state.values() for key in state} - {"step"}
    masters: dict[Tensor, Tensor] = {}
    is_rounded = stage == 0 and hasattr(optimizer, "fp32_groups")
    for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True) if is_rounded else ():
        masters.update(zip(low, full, strict=True))
    if stage in (1, 2):  # a load cuts this
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, base.state)
    steps = {float(state["step"]) for state in base.state.values() if "step" in state}
    assert len(steps) <= 1, steps
    computed = whole_module(inner, stage)
    result: dict[str, dict[str, Tensor]] = {}
    for name, parameter in inner.module.named_parameters():
        # Muon steps matrices, AdamW all else.
        is_muons = "momentum" in kept and name.endswith("weight") and "LayerNorm" not in name
        keys = {"momentum"} if is_muons else kept - {"momentum"}
        if stage == 0:
            master = masters.get(parameter, parameter)
            values = {key: base.state[master][key] for key in keys}
        else:
            master = safe_get_full_fp32_param(parameter)
            values = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        values |= {"weights": master, "computed": computed[name]}
        if steps:
            values["step"] = torch.tensor(max(steps))
        result[name] = {key: value.detach().clone().reshape(-1) for key, value in values.items()}
    return result


def whole_module(inner: Any, stage: int) -> dict[str, Tensor]:
    """The module's own weights, gathered from DeepSpeed's cuts."""
    parameters = dict(inner.module.named_parameters())
    if stage < 3:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    whole = {}
    for name, parameter in parameters.items():
        cuts = parameter.ds_tensor.new_empty(torch.distributed.get_world_size() * parameter.partition_numel())
        torch.distributed.all_gather_into_tensor(cuts, parameter.ds_tensor)
        whole[name] = cuts[: parameter.ds_numel].view(parameter.ds_shape)
    return whole


def save(folder: Path) -> None:
    """One rank: train and save every case."""
    ranks = _join()
    results: Results = {}
    for case in CASES:
        engine, inner = build(case)
        for window in range(WINDOW):
            train(engine, window)
        engine.save(folder / f"{case} by {ranks}", WINDOW)
        results[str(case)] = content(inner, engine.zero_stage), train(engine, WINDOW)
        results[f"{case}, a window later"] = content(inner, engine.zero_stage), None
    _leave(results, folder / f"save by {ranks}.pt")


def load(folder: Path, saved_by: int) -> None:
    """One rank: load what so many ranks have saved, train on, load it again."""
    ranks = _join()
    results: Results = {}
    for case, stage in loads(saved_by, ranks):
        engine, inner = build(Case(case.optimizer, case.precision, stage))
        engine.load(folder / f"{case} by {saved_by}", WINDOW, saved_by, case.stage)
        results[f"{case} to {stage}"] = content(inner, engine.zero_stage), train(engine, WINDOW)
        results[f"{case} to {stage}, a window later"] = content(inner, engine.zero_stage), None
        engine.load(folder / f"{case} by {saved_by}", WINDOW, saved_by, case.stage)
        results[f"{case} to {stage}, again"] = content(inner, engine.zero_stage), None
    _leave(results, folder / f"load by {ranks} of {saved_by}.pt")


def _join() -> int:
    from fedbert_ds.server.body.distributed import initialize

    initialize()
    return torch.distributed.get_world_size()


def _leave(results: Results, path: Path) -> None:
    from fedbert_ds.server.body.distributed import shut_down

    if torch.distributed.get_rank() == 0:
        torch.save(results, path)
    shut_down()
