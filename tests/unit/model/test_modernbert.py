"""ModernBERT through the cut is transformers' own: windows, angles, gates, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForMaskedLM, ModernBertConfig
from unit.model.samples import PAD, Packed, pack

from fedbert_ds.config import LayersCut, ModelSection
from fedbert_ds.errors import ModelError
from fedbert_ds.model.checkpoint import build_model, config_from_json, config_to_json, shape_hash
from fedbert_ds.model.cut import merge, split
from fedbert_ds.model.flops import BodyWork
from fedbert_ds.model.modernbert import ExactRotary

PUBLISHED = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
    "classifier_pooling": "mean", "cls_token_id": 1, "decoder_bias": True, "deterministic_flash_attn": False,
    "embedding_dropout": 0.0, "eos_token_id": 2, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 32, "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.2, "intermediate_size": 48, "layer_norm_eps": 1e-05, "local_attention": 128,
    "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0,
    "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 2,
    "num_hidden_layers": 5, "pad_token_id": 3, "position_embedding_type": "absolute", "sep_token_id": 2,
    "tie_word_embeddings": True, "torch_dtype": "float32", "vocab_size": 61,
}  # fmt: skip
"""The keys of the published config.json, whose names for windows and angles are older than
transformers', at a small width.
"""
LENGTHS = [150, 1, 301, 64, 65, 2]
"""Around the window's 64 positions on either side, and beyond."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder as the hub has it, of random weights."""
    torch.manual_seed(5)
    AutoModelForMaskedLM.from_config(ModernBertConfig.from_dict(PUBLISHED)).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(PUBLISHED))
    return tmp_path / "hub"


def step_alone(model: Any, packed: Packed) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' scores at masked positions and gradients, each sequence by itself, unpadded."""
    scores = torch.cat([model(row.unsqueeze(0)).logits[0] for row in packed.input_ids.split(packed.lengths)])
    scores = scores[packed.masked]
    functional.cross_entropy(scores, packed.labels, reduction="sum").backward()
    return scores.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cut", ["embeddings", "rows", LayersCut(layers=2)], ids=str)
def test_a_checkpoint_of_the_hub_steps_as_transformers_own(checkpoint: Path, cut: Any, implementation: str) -> None:
    packed = pack(LENGTHS)
    whole = AutoModelForMaskedLM.from_pretrained(checkpoint, attn_implementation=implementation)
    scores, gradients = step_alone(whole, packed)
    client, body = split(build_model(ModelSection(checkpoint=str(checkpoint), dropout=0.0), 61, 3, seed=1), cut)
    activations = client.embed(packed.input_ids, packed.lengths)
    received = activations.values.detach().requires_grad_()
    row_index = None if activations.row_index is None else activations.row_index.long()
    hidden = body(received, packed.masked, packed.cu_seqlens, row_index)
    torch.testing.assert_close(client.logits(hidden).detach(), scores, atol=2e-5, rtol=1e-5)
    _, gradient = client.head_backward(hidden.detach(), packed.labels, 1.0)
    hidden.backward(gradient)
    activations.values.backward(received.grad)
    found = {name: parameter.grad for half in (client, body) for name, parameter in half.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert (found[name] - expected).abs().max() <= 2e-5 * expected.abs().max(), name


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    window=st.integers(1, 8).map(lambda each_side: 2 * each_side),
    every=st.integers(1, 3),
)
def test_neighbours_in_a_packing_do_not_matter(lengths: list[int], window: int, every: int) -> None:
    section = ModelSection(
        architecture="modernbert", hidden_size=16, num_hidden_layers=3, dropout=0.0, local_attention=window,
        global_attention_every=every, initializer_range=0.3,
    )  # fmt: skip
    client, body = split(build_model(section, 61, PAD, seed=1), "embeddings")
    packed = pack(lengths)
    with torch.no_grad():
        values = client.embed(packed.input_ids, lengths).values
        together = body(values, torch.arange(sum(lengths)), packed.cu_seqlens)
        alone = [body(rows, torch.arange(len(rows)), torch.tensor([0, len(rows)])) for rows in values.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_window_more_or_less_would_be_seen(checkpoint: Path) -> None:
    """The tests above would prove less otherwise."""
    packed = pack(LENGTHS)
    hidden = []
    for window in (126, 128, 130):
        model = build_model(ModelSection(checkpoint=str(checkpoint), dropout=0.0), 61, 3, seed=1)
        model.config.local_attention = window
        client, body = split(model, "embeddings")
        with torch.no_grad():
            activations = client.embed(packed.input_ids, packed.lengths).values
            hidden.append(body(activations, packed.masked, packed.cu_seqlens))
    assert all((other - hidden[1]).abs().max() > 1e-3 for other in (hidden[0], hidden[2]))


@pytest.mark.parametrize("cut", ["embeddings", "rows", LayersCut(layers=2)], ids=str)
def test_a_checkpoint_of_the_hub_merges_to_its_bits_and_reloads(checkpoint: Path, cut: Any, tmp_path: Path) -> None:
    published = AutoModelForMaskedLM.from_pretrained(checkpoint)
    client, body = split(build_model(ModelSection(checkpoint=str(checkpoint), dropout=0.0), 61, 3, seed=1), cut)
    received = config_from_json(config_to_json(client.config))
    assert shape_hash(received) == shape_hash(published.config)
    merge(received, client.state_dict(), body.state_dict()).save_pretrained(tmp_path / "merged")
    again, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    tensors = again.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in published.state_dict().items())
    input_ids = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, published(input_ids).logits)


def test_shapes_that_compute_something_else_have_other_hashes() -> None:
    changes = (
        {},
        {"local_attention": 64},
        {"global_attn_every_n_layers": 2},
        {"global_rope_theta": 1e4},
        {"mlp_bias": True},
    )
    assert len({shape_hash(ModernBertConfig.from_dict(PUBLISHED | change)) for change in changes}) == len(changes)


def test_angles_stay_exact_in_bf16(checkpoint: Path) -> None:
    _, body = split(build_model(ModelSection(checkpoint=str(checkpoint), dropout=0.0), 61, 3, seed=1), "embeddings")
    exact = {name: buffer.clone() for name, buffer in body.named_buffers()}
    body.bfloat16()
    assert len(exact) == 4 and {parameter.dtype for parameter in body.parameters()} == {torch.bfloat16}
    assert all(torch.equal(buffer, exact[name]) for name, buffer in body.named_buffers())
    rotary: Any = body.get_submodule("model.rotary_emb")
    assert isinstance(rotary, ExactRotary)
    positions = torch.tensor([[8000]])
    cosine, _ = rotary(torch.empty(1, dtype=torch.bfloat16), positions, "sliding_attention")
    # Their own, rounded, would be far off.
    rounded = exact["model.rotary_emb.sliding_attention_inv_freq"].bfloat16().float() * 8000
    angles = exact["model.rotary_emb.sliding_attention_inv_freq"] * 8000
    torch.testing.assert_close(cosine[0, 0, :8].float(), angles.cos(), atol=4e-3, rtol=0)
    assert (rounded.cos() - angles.cos()).abs().max() > 0.5
    body.to("meta")
    assert all(buffer.is_meta and buffer.dtype == torch.float32 for buffer in body.buffers())


def with_rope(checkpoint: Path, rope: dict[str, Any]) -> Any:
    fields = {key: value for key, value in PUBLISHED.items() if not key.endswith("rope_theta")}
    kinds = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    (checkpoint / "config.json").write_text(json.dumps(fields | {"rope_parameters": kinds}))
    return build_model(ModelSection(checkpoint=str(checkpoint), dropout=0.0), 61, 3, seed=1)


def test_stretched_angles_are_transformers_own(checkpoint: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 2048}
    model, packed = with_rope(checkpoint, rope), pack(LENGTHS)
    scores, _ = step_alone(model, packed)
    client, body = split(model, "embeddings")
    with torch.no_grad():
        values = client.embed(packed.input_ids, packed.lengths).values
        found = client.logits(body(values, packed.masked, packed.cu_seqlens))
    torch.testing.assert_close(found, scores, atol=2e-5, rtol=1e-5)


def test_angles_that_depend_on_packing_are_refused(checkpoint: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e5, "factor": 4.0}
    with pytest.raises(ModelError, match=r"rope_type dynamic of full_attention turns with the longest sequence"):
        with_rope(checkpoint, rope)


def test_a_new_model_has_the_published_proportions() -> None:
    model = build_model(ModelSection(architecture="modernbert", hidden_size=32, num_hidden_layers=7), 61, PAD, seed=1)
    config = model.config
    assert (config.intermediate_size, config.local_attention, config.pad_token_id) == (48, 128, PAD)
    assert config.classifier_pooling == PUBLISHED["classifier_pooling"], "how a classifier made of it reads"
    assert [kind == "full_attention" for kind in config.layer_types] == [number % 3 == 0 for number in range(7)]
    assert config.cls_token_id is None and not config.norm_bias


def test_sliding_windows_compute_less() -> None:
    """Pairs of tokens that see each other, counted one by one."""
    work = BodyWork(per_token=0, per_masked=0, hidden_size=1, sliding_windows=(4, None))
    for length in (1, 4, 5, 6, 30):
        pairs = sum(abs(i - j) <= 4 for i in range(length) for j in range(length))
        assert work.flops_per_token(0.0, length) == pytest.approx(12 * (pairs + length * length) / length)
