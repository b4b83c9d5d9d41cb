"""What clients may send, by the run file and the client half."""

from __future__ import annotations

from typing import Any

import pytest

from fedbert_ds.config import RunConfig
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.model.cut import client_skeleton
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.contract import TensorContract
from fedbert_ds.server.run_contract import build_contract, most_window_bytes

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16}


def config_with(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {"model": SMALL, "data": {"sequence_length": 12}, "window": {"tokens_per_micro_batch": 64}}
    return parse_config({**tree, **sections}, "test")


def half_of(config: RunConfig) -> Any:
    from fedbert_ds.model.checkpoint import config_of

    return client_skeleton(config_of(config.model, 30, 0), config.cut)


BOTH = {"embeddings", "head"}


@pytest.mark.parametrize("cut", ["embeddings", "rows", {"layers": 1}])
def test_clients_may_send_what_the_cut_and_the_codecs_say(cut: Any) -> None:
    config = config_with(cut=cut, wire={"activations": "int8", "gradients": "bf16"})
    half = half_of(config)
    contract = build_contract(config, half)
    assert contract.activations == TensorContract("int8", half.widths.activations, 64)
    assert contract.gradients == TensorContract("bf16", half.widths.hidden, 64, is_gradient=True)
    assert contract.is_rows_cut == (cut == "rows") and contract.longest_sequence == 12
    assert contract.exchanged == {name: tuple(p.shape) for name, p in half.named_parameters()}


@pytest.mark.parametrize(
    ("federation", "parts", "handed_over"),
    [
        ({"mode": "synchronous"}, BOTH, set()),
        ({"mode": "parallel"}, BOTH, BOTH),
        ({"mode": "parallel", "average_scope": "head"}, {"head"}, {"head"}),
        ({"mode": "parallel", "average_scope": "head", "personal_parts": "averaged"}, {"head"}, BOTH),
    ],
    ids=["synchronous", "parallel", "parallel, head alone", "parallel, head alone, the rest at the end"],
)
def test_updates_carry_what_is_exchanged(federation: dict[str, Any], parts: set[str], handed_over: set[str]) -> None:
    config = config_with(federation=federation, wire={"updates": "int8"})
    half = half_of(config)
    contract = build_contract(config, half)
    assert {half.parameter_scope(name) for name in contract.exchanged} == parts
    assert {half.parameter_scope(name) for name in contract.handed_over} == handed_over
    assert contract.update_codec == "int8"


def test_a_window_s_most_bytes_are_those_of_one_client_with_all_text() -> None:
    config = config_with(window={"tokens": 1000, "tokens_per_micro_batch": 64}, clients={"expected": 4})
    contract = build_contract(config, half_of(config))
    strategy = strategy_of_run(config)
    # Activations and gradients of the hidden size, four bytes a number.
    assert most_window_bytes(config, strategy, contract) == 4 * 1000 * (8 + 8)


def test_a_window_of_few_clients_has_more_of_each() -> None:
    config = config_with(window={"tokens": 1000, "tokens_per_micro_batch": 64}, clients={"expected": 4},
                         federation={"mode": "parallel", "participants": 2})  # fmt: skip
    contract = build_contract(config, half_of(config))
    strategy = strategy_of_run(config)
    assert most_window_bytes(config, strategy, contract) == 2 * 4 * 1000 * (8 + 8)
