"""Divides a Hugging Face encoder with its head into client half and body, and joins them again.

A half is the model itself without the other half's modules: nothing is renamed and no layer is
copied. It is built on torch's meta device, where modules take no memory, and only its own tensors
are allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbert_ds.config import Cut, LayersCut
from fedbert_ds.errors import ModelError
from fedbert_ds.model.architecture import architecture, layers_of, words_of
from fedbert_ds.model.body import Body
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.heads import auto_class


class Elsewhere(nn.Module):
    """Stands for an encoder layer of the other half, so that indices and names stay."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Pass hidden states on as they are."""
        return hidden_states


def split(model: PreTrainedModel, cut: Cut) -> tuple[ClientHalf, Body]:
    """Divide a model; the halves take over its tensors, so it must not be used afterwards.

    ModelError if the cut leaves the server no layer.
    """
    state = model.state_dict()
    halves = _client_on_meta(model.config, cut), _body_on_meta(model.config, cut)
    for half in halves:
        _take_over(half, state, model.training)
    return halves


def undivided(model: PreTrainedModel) -> ClientHalf:
    """The whole model as the client's, with `cut: whole`; it takes over the model's tensors."""
    half = _client_on_meta(model.config, "whole")
    _take_over(half, model.state_dict(), model.training)
    return half


def merge(hf_config: Any, client_state: Mapping[str, Tensor], body_state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The whole model, fp32 on the CPU, from its halves' states; bit-exact and tied as configured.

    ModelError if tensors are missing, left over, in both halves, or of another shape.
    """
    model = _on_meta(hf_config)
    model.to_empty(device="cpu")
    _fill_buffers(model)
    model.tie_weights()
    state = {**client_state, **body_state}
    if len(state) != len(client_state) + len(body_state):
        raise ModelError(f"both halves hold {min(client_state.keys() & body_state.keys())}; were they cut alike?")
    state.update({alias: state[source] for alias, source in model.all_tied_weights_keys.items() if source in state})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"the halves do not make a whole model ({' '.join(str(error).split())}); give the halves of one run's end"
        ) from error
    return model.eval()


def client_outline(hf_config: Any, cut: Cut) -> ClientHalf:
    """A client half on the meta device: names and shapes, no memory."""
    return _client_on_meta(hf_config, cut)


def body_outline(hf_config: Any, cut: Cut) -> Body:
    """A body on the meta device: names and shapes, no memory. ModelError for `cut: whole`."""
    return _body_on_meta(hf_config, cut)


def client_skeleton(hf_config: Any, cut: Cut) -> ClientHalf:
    """A client half on the CPU, weights yet to be loaded; the body is never allocated."""
    half = _client_on_meta(hf_config, cut)
    half.to_empty(device="cpu")
    half.tie()
    _fill_buffers(half)
    return half


def body_skeleton(hf_config: Any, cut: Cut) -> Body:
    """A body on the CPU, weights yet to be loaded; the client half is never allocated."""
    half = _body_on_meta(hf_config, cut)
    half.to_empty(device="cpu")
    _fill_buffers(half)
    return half


def _on_meta(hf_config: Any) -> PreTrainedModel:
    hf_config = copy.deepcopy(hf_config)
    # A half's config names packed attention; a whole model has transformers' default.
    hf_config._attn_implementation = None
    with torch.device("meta"):
        return auto_class(hf_config).from_config(hf_config, dtype=torch.float32)


def _take_over(half: ClientHalf | Body, state: Mapping[str, Tensor], training: bool) -> None:
    names = half.state_dict().keys()
    half.load_state_dict({name: state[name] for name in names}, assign=True)
    _fill_buffers(half)
    half.train(training)


def _client_on_meta(hf_config: Any, cut: Cut) -> ClientHalf:
    model, parts = _on_meta(hf_config), architecture(hf_config)
    if cut == "whole":
        return ClientHalf(model, cut)
    base: Any = model.get_submodule(parts.base)
    if isinstance(cut, LayersCut):
        _check_layers(hf_config, cut)
        layers = layers_of(base, hf_config)
        for index in range(cut.layers, hf_config.num_hidden_layers):
            layers[index] = Elsewhere()
        if parts.after_layers is not None:
            setattr(base, parts.after_layers, None)
    else:
        for name in parts.encoder:
            setattr(base, name, None)
    if cut == "rows":
        words = words_of(base, hf_config)
        base.embeddings = nn.Module()
        setattr(base.embeddings, parts.words, words)
    if parts.body_head is not None:
        setattr(model, parts.body_head, None)
    return ClientHalf(model, cut)


def _body_on_meta(hf_config: Any, cut: Cut) -> Body:
    if cut == "whole":
        raise ModelError("cut: whole leaves the server no body; choose another cut")
    model, parts = _on_meta(hf_config), architecture(hf_config)
    base: Any = model.get_submodule(parts.base)
    for name in parts.heads:
        parent, _, part = name.rpartition(".")
        setattr(model.get_submodule(parent), part, None)
    if isinstance(cut, LayersCut):
        _check_layers(hf_config, cut)
        layers = layers_of(base, hf_config)
        for index in range(cut.layers):
            layers[index] = Elsewhere()
        base.embeddings_project = None
    if cut == "rows":
        setattr(base.embeddings, parts.words, None)
    else:
        base.embeddings = None
    return Body(model, cut)


def _check_layers(hf_config: Any, cut: LayersCut) -> None:
    if cut.layers >= hf_config.num_hidden_layers:
        raise ModelError(
            f"cut.layers {cut.layers} leaves the server no layer of the model's {hf_config.num_hidden_layers}; lower it"
        )


def _fill_buffers(module: nn.Module) -> None:
    # Buffers that constructors compute and state dicts leave out: on meta they have no content.
    for part in module.modules():
        positions = getattr(part, "position_ids", None)
        if isinstance(positions, Tensor):
            part.position_ids = torch.arange(positions.shape[-1]).expand((1, -1))
            if hasattr(part, "token_type_ids"):
                part.token_type_ids = torch.zeros(positions.shape, dtype=torch.long)
        if hasattr(part, "rope_type"):
            part._buffers.update(type(part)(part.config)._buffers)
    unfilled = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not unfilled, f"no content for {unfilled}"
