"""A scenario from a run file and the machines: floating-point operations, bytes and rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fedbert_ds.config import LayersCut, RunConfig
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.planner.scenario import BodyCosts, ClientCosts, Scenario, Spread, Wire
from fedbert_ds.server.body.footprint import SHARE, bytes_kept

COMPRESSED = {
    "fp32": 0.84, "bf16": 0.68, "fp8_e4m3": 0.83, "fp8_e5m2": 0.70, "int8": 0.915, "int8_group": 0.94,
    "int4_hadamard": 0.86, "int2_hadamard": 0.90,
}  # fmt: skip
"""Share of each codec's bytes left after compression, as `benchmarks/codecs` counted them."""
VOCABULARY = 30_522
"""BERT's, for a run file that names a tokenizer."""
VOCABULARIES = {"roberta": 50_265, "modernbert": 50_368}
"""Of the other published models."""


@dataclass(frozen=True)
class Machines:
    """What there is to train on."""

    gpus: int = 1
    gpu_flops: float = 989e12
    """Dense bf16 FLOP/s of one GPU by its data sheet (H100 SXM: 989 T)."""
    efficiency: float = 0.4
    """Share of `gpu_flops` the body reaches; `fedbert-ds bench body` measures it."""
    gpu_memory: float = 80e9
    """Bytes."""
    gpu_bandwidth: float = 3.35e12
    """Bytes/s of its memory, the bound of an optimizer step."""
    between_gpus: float = 200e9
    """Bytes/s a GPU moves in the ranks' collectives."""
    network: float = 25e9 / 8
    """Bytes/s of one rank's network to clients, each way."""
    launch_per_layer: float = 1.5e-3
    """Seconds the host takes to launch a layer's forward and backward. `fedbert-ds bench host`
    measures it, arithmetic included: 3 ms on two old cores."""
    codec_cores: float = 4.0
    """Cores of a rank that compress and decompress."""
    codec_per_byte: float = 2.7e-9
    """Seconds a core takes for a byte that arrives or leaves; `fedbert-ds bench network` measures
    it."""
    price: float = 2.5
    """Of one GPU for an hour."""
    clients: int = 16
    client_flops: float = 100e9
    """FLOP/s of a client: a laptop's CPU."""
    rtt: float = 0.05
    """Seconds."""
    up: float = 100e6 / 8
    """Bytes/s of a client's link, up."""
    down: float = 100e6 / 8
    """Bytes/s of a client's link, down."""
    spread: Spread = field(default_factory=Spread)


@dataclass(frozen=True)
class Model:
    """Sizes of the body and the client half."""

    body_layers: int
    body_parameters: int
    half_parameters: int
    body_flops: float
    """A token, forward and backward."""
    attention_flops: float
    """Of these, scores and their use."""
    embed_flops: float
    head_flops: float
    """A token, at the run's share of masked tokens."""


def derive(config: RunConfig, machines: Machines) -> tuple[Scenario, Model]:
    """The scenario of a run file on these machines.

    Raises ModelError if there is no such model, ConfigError as `deepspeed_settings`.
    """
    hf_config = model_config_of(config)
    model = _model(config, hf_config)
    kept, recomputed = bytes_in_flight(config, hf_config), config.body.recomputed("cuda")
    of_attention = model.attention_flops / model.body_flops if recomputed == "attention" else 0.0
    forwards_again = (recomputed == "layers") + of_attention
    rate = machines.gpu_flops * machines.efficiency
    # Gradients are summed up in fp32, each rank's part; weights come back in bf16.
    reduced = (4 + 2) * model.body_parameters / machines.between_gpus if machines.gpus > 1 else 0.0
    typical = ClientCosts(
        embed_per_token=model.embed_flops / 2 / machines.client_flops,
        head_per_token=model.head_flops / machines.client_flops,
        per_message=1e-3,
        rtt=machines.rtt,
        up=machines.up,
        down=machines.down,
    )
    scenario = Scenario(
        body=BodyCosts(
            forward_per_token=model.body_flops / 3 / rate,
            backward_per_token=model.body_flops * (2 + forwards_again) / 3 / rate,
            per_micro_batch=1e-3,
            launch=machines.launch_per_layer * model.body_layers * (1 + forwards_again / 3),
            # Weights, gradients and two moments, fp32, are read and most of them written.
            step=7 * 4 * model.body_parameters / machines.gpus / machines.gpu_bandwidth + reduced,
            gather=2e-3,
        ),
        clients=machines.spread.clients(typical, machines.clients),
        wire=wire_bytes(config, hf_config, model),
        strategy=strategy_of_run(config),
        tokens_per_window=config.window.tokens,
        tokens_per_micro_batch=config.window.tokens_per_micro_batch,
        sequence_tokens=config.data.sequence_length,
        num_ranks=machines.gpus,
        clients_per_micro_batch=config.window.clients_per_micro_batch,
        micro_batches_in_flight=config.window.micro_batches_in_flight,
        affordable_in_flight=max(1, int(SHARE * machines.gpu_memory / kept)),
        bytes_kept_per_token=kept / config.window.tokens_per_micro_batch,
        staleness=config.federation.staleness,
        # Half of the cores work in each direction.
        server_bytes_per_second=min(machines.network, machines.codec_cores / 2 / machines.codec_per_byte),
    )
    return scenario, model


def bytes_in_flight(config: RunConfig, hf_config: Any) -> int:
    """What a GPU keeps of a whole micro-batch between forward and backward; with cut: rows also the
    rows in fp32.
    """
    from fedbert_ds.model.architecture import widths

    tokens, length = config.window.tokens_per_micro_batch, config.data.sequence_length
    width, rows = widths(hf_config, config.cut).activations, None
    if config.cut == "rows":
        clients = config.window.clients_per_micro_batch
        rows = clients * min(hf_config.vocab_size, distinct_rows(max(1, tokens // clients)))
    recomputed = config.body.recomputed("cuda")
    dtype = torch.bfloat16 if config.body.precision == "bf16" else torch.float32
    lengths = [min(length, tokens)] * max(1, tokens // length)
    masked = round(config.data.mask_probability * sum(lengths))
    kept = bytes_kept(hf_config, config.cut, config.kernels, recomputed, dtype, lengths, masked, rows)
    return kept + 4 * width * (rows or 0)


def wire_bytes(config: RunConfig, hf_config: Any, model: Model) -> Wire:
    """Bytes a token in each direction, by the wire's formats and compression."""
    from fedbert_ds.model.architecture import widths
    from fedbert_ds.wire.codecs import frame_bytes

    width = widths(hf_config, config.cut)
    masked = config.data.mask_probability
    piece = max(1, config.window.tokens_per_micro_batch // config.window.clients_per_micro_batch)
    rows, index = piece, 0.0
    if config.cut == "rows":
        rows = min(piece, hf_config.vocab_size, distinct_rows(piece))
        index = max(0, rows - 1).bit_length() / 8

    def per_token(codec: str, num_rows: float, columns: int) -> float:
        left = COMPRESSED[codec] if config.wire.is_compressed else 1.0
        return left * sum(frame_bytes(1000, columns, codec)) / 1000 * num_rows / piece

    positions = 1 / 8
    return Wire(
        activations=per_token(config.wire.activations, rows, width.activations) + index + positions,
        hidden=per_token(config.wire.hidden_states, masked * piece, width.hidden),
        gradient=per_token(config.wire.gradients, masked * piece, width.hidden),
        input_gradient=per_token(config.wire.gradients, rows, width.activations),
        update=4.0 * model.half_parameters,
    )


def distinct_rows(tokens: int) -> int:
    """Distinct word pieces among `tokens` tokens of English.

    Heaps' law, fitted to WikiText with BERT's vocabulary.
    """
    return max(1, min(tokens, round(1.89 * tokens**0.761)))


def model_config_of(config: RunConfig) -> Any:
    """The Hugging Face config of a run's model, with its tokenizer's usual vocabulary.

    Raises ModelError for a checkpoint that is not there.
    """
    if config.model.checkpoint is not None:
        from transformers import AutoConfig

        from fedbert_ds.errors import ModelError

        try:
            return AutoConfig.from_pretrained(config.model.checkpoint, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.checkpoint {config.model.checkpoint}: no such model; name a folder or hub name"
            ) from error
    from fedbert_ds.model.checkpoint import config_of

    named = VOCABULARIES.get(config.model.architecture, VOCABULARY)
    vocabulary = named if config.tokenizer.path else config.tokenizer.vocab_size
    return config_of(config.model, vocabulary, 0)


def _model(config: RunConfig, hf_config: Any) -> Model:
    from fedbert_ds.model.cut import body_skeleton, client_skeleton

    body, half = body_skeleton(hf_config, config.cut), client_skeleton(hf_config, config.cut)
    share = config.data.mask_probability
    embed = half.flops_per_token(0.0)
    taken = config.cut.layers if isinstance(config.cut, LayersCut) else 0
    return Model(
        body_layers=hf_config.num_hidden_layers - taken,
        body_parameters=body.num_parameters,
        half_parameters=half.num_parameters,
        body_flops=body.flops_per_token(share, config.data.sequence_length),
        attention_flops=body.flops_per_token(share, config.data.sequence_length) - body.flops_per_token(share, 0.0),
        # A look-up is bound by memory; 20 operations a value stand for that, forward and backward.
        embed_flops=embed + 20.0 * half.widths.activations,
        head_flops=half.flops_per_token(share) - embed,
    )
