"""What a rank decides before it serves: what clients may send, and where its network runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedbert_ds.config import RunConfig, parse_config
from fedbert_ds.model.cut import client_skeleton
from fedbert_ds.server.contract import TensorContract
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.serve import build_contract, build_endpoint

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


@pytest.mark.parametrize(
    ("network", "has_gpu", "kind"),
    [
        ("auto", False, Endpoint),
        ("auto", True, EndpointProcess),
        ("thread", True, Endpoint),
        ("process", False, EndpointProcess),
    ],
)
def test_the_network_has_a_process_of_its_own_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, network: str, has_gpu: bool, kind: type
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = config_with(server={"network": network, "port": 0})
    assert type(build_endpoint(config.server, config.clients, rank=0, tokens={})) is kind
