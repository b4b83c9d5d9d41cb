"""A scenario from a run file: known sizes and bytes, rates that follow from the machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedbert_ds.errors import ModelError
from fedbert_ds.model.checkpoint import config_of
from fedbert_ds.planner.derive import COMPRESSED, VOCABULARY, Machines, derive, distinct_rows
from fedbert_ds.run_file import load_config
from fedbert_ds.server.body.footprint import SHARE, bytes_kept
from fedbert_ds.wire.codecs import NAMES, encode

CONFIGS = Path(__file__).parents[3] / "configs"


def config(*overrides: str):
    return load_config(CONFIGS / "bert-base.yaml", overrides)


def test_sizes_of_bert_base():
    scenario, model = derive(config(), Machines())
    assert model.body_parameters == pytest.approx(85.1e6, rel=0.01)  # 12 layers
    assert model.half_parameters == pytest.approx(24.1e6, rel=0.01)  # word table 23.4 M, head transform 0.6 M
    assert model.body_flops == pytest.approx(6 * 85e6, rel=0.08)
    assert scenario.wire.update == 4 * model.half_parameters


@pytest.mark.parametrize(
    ("file", "body", "half"),
    [
        ("bert-large", 302.3e6, 32.3e6),  # 24 layers of 12 x 1024 x 1024
        ("electra-base", 85.2e6, 3.9e6),  # the widening projection; a table of 128
        ("modernbert-base", 110.3e6, 39.3e6),  # 22 layers of 4 x 768 x 768 and 3 x 768 x 1152
        ("fedbert-roberta-base", 85.1e6, 39.6e6),
        ("fedbert-sequential", 85.1e6, 39.6e6),
    ],
)
def test_sizes_of_shipped_models(file: str, body: float, half: float) -> None:
    scenario, model = derive(load_config(CONFIGS / f"{file}.yaml"), Machines())
    assert model.body_parameters == pytest.approx(body, rel=0.01)
    assert model.half_parameters == pytest.approx(half, rel=0.01)
    assert scenario.wire.up > 0 and model.body_flops > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 768 int8 and a 4-byte scale, up and down; 15 % of that twice; a bit for the mask.
        (["wire.activations=int8", "wire.gradients=int8", "wire.compression=none"], 2 * 772 * 1.15),
        (["wire.activations=fp32", "wire.gradients=fp32", "wire.compression=none"], 2 * 3072 * 1.15),
        (["wire.activations=int8", "wire.gradients=int8"], 2 * 772 * 1.15 * COMPRESSED["int8"]),
    ],
)
def test_bytes_a_token(overrides, expected):
    scenario, _ = derive(config("cut=embeddings", *overrides), Machines())
    assert scenario.wire.up + scenario.wire.down == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("codec", NAMES)
def test_what_compression_leaves_is_about_what_it_leaves_of_normal_numbers(codec):
    values = torch.randn(400, 768, generator=torch.Generator().manual_seed(1))
    plain, small = (encode(values, codec, compressed=compressed).ByteSize() for compressed in (False, True))
    assert COMPRESSED[codec] == pytest.approx(small / plain, abs=0.02)


def test_rows_are_cheaper_in_large_messages():
    wires = [derive(config(f"window.tokens_per_micro_batch={n}"), Machines())[0].wire for n in (512, 16384)]
    assert wires[1].up + wires[1].down < 0.65 * (wires[0].up + wires[0].down)
    assert distinct_rows(512) == pytest.approx(218, rel=0.02) and distinct_rows(16384) == pytest.approx(3046, rel=0.02)


def test_rates_follow_from_the_machines():
    machines = Machines(gpus=2, gpu_flops=1e14, efficiency=0.5, client_flops=1e10, rtt=0.2, up=1e6, down=2e6, clients=3)
    scenario, model = derive(config(), machines)
    body, clients = scenario.body, scenario.clients
    assert body.forward_per_token + body.backward_per_token == pytest.approx(model.body_flops / 0.5e14)
    assert body.backward_per_token == pytest.approx(2 * body.forward_per_token)
    assert {(client.rtt, client.up, client.down) for client in clients} == {(0.2, 1e6, 2e6)} and len(clients) == 3
    assert clients[0].head_per_token == pytest.approx(model.head_flops / 1e10)
    assert scenario.num_ranks == 2 and scenario.tokens_per_window == config().window.tokens


def test_a_step_reads_the_weights_and_with_two_gpus_exchanges_them():
    alone, shared = (derive(config(), Machines(gpus=gpus))[0].body.step for gpus in (1, 2))
    parameters = derive(config(), Machines())[1].body_parameters
    assert alone == pytest.approx(28 * parameters / 3.35e12)
    assert shared == pytest.approx(alone / 2 + 6 * parameters / 200e9)


def test_micro_batches_in_flight_are_what_memory_holds():
    def held(*overrides: str, **machine: float) -> int:
        return derive(config(*overrides), replace(Machines(), **machine))[0].affordable_in_flight

    def by(what: str) -> str:
        return f"body.activation_checkpointing={what}"

    assert held() == held(by("elementwise")) > held(by("none")) > held(by("none"), "body.precision=fp32")
    assert held(by("none")) > held(by("none"), "kernels=torch")
    assert held(by("layers")) > 5 * held() > 5 and held(by("int8")) > held(by("attention")) > held()
    assert held(gpu_memory=160e9) == pytest.approx(2 * held(), abs=1)
    assert held(gpu_memory=1.0) == 1


def test_a_micro_batch_in_flight_keeps_what_is_counted():
    settings = config("cut=embeddings", "data.sequence_length=512", "window.tokens_per_micro_batch=1024")
    hf_config = config_of(settings.model, VOCABULARY, 0)
    kept = bytes_kept(hf_config, "embeddings", "auto", "elementwise", torch.bfloat16, [512, 512], round(0.15 * 1024))
    scenario, _ = derive(settings, Machines())
    assert scenario.bytes_kept_per_token == kept / 1024
    assert scenario.affordable_in_flight == int(SHARE * 80e9 / (1024 * scenario.bytes_kept_per_token))


def test_layers_that_are_computed_again_forward_twice_and_stage_3_does_not():
    plain, divided = (derive(config(f"body.zero_stage={stage}"), Machines())[0] for stage in (1, 3))
    assert divided.bytes_kept_per_token == plain.bytes_kept_per_token and divided.body == plain.body
    layers, _ = derive(config("body.activation_checkpointing=layers"), Machines())
    assert layers.body.forward_per_token == plain.body.forward_per_token
    assert layers.body.backward_per_token == pytest.approx(plain.body.backward_per_token * 3 / 2)


def test_attention_that_is_computed_again_costs_its_forward_alone():
    plain, again = (
        derive(config("data.sequence_length=512", f"body.activation_checkpointing={what}"), Machines())
        for what in ("elementwise", "attention")
    )
    (body, model), (other, _) = (plain[0].body, plain[1]), (again[0].body, again[1])
    # Of each layer two products of a token's width with 512 others, each of two operations.
    flops = 12 * 2 * 2 * 768 * 512
    assert model.attention_flops == 3 * flops
    extra = flops / (model.body_flops / 3) * body.forward_per_token
    assert other.backward_per_token - body.backward_per_token == pytest.approx(extra)
    assert 1 < other.launch / body.launch < 1.05


def test_a_vocabulary_is_the_trained_one_or_berts():
    halves = [
        derive(config(*overrides), Machines())[1].half_parameters
        for overrides in (("tokenizer.path=null", "tokenizer.vocab_size=1000"), ("tokenizer.path=anything",))
    ]
    # Every word piece has a row of the table and a bias.
    assert halves[1] - halves[0] == (VOCABULARY - 1000) * (768 + 1)


def test_a_model_that_does_not_exist_is_one_line(tmp_path: Path):
    with pytest.raises(ModelError, match="no such model"):
        derive(config(f"model.checkpoint={tmp_path / 'nothing'}"), Machines())
