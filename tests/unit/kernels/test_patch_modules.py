"""Patched modules: values and gradients as before in every model; names, refusals, dropout."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from unit.kernels.bounds import DEVICE, needs_triton, on_device  # noqa: F401

from fedbert_kernels import patch_modules as module
from fedbert_kernels import row_choice
from fedbert_kernels.patch_modules import patch_modules

pytestmark = needs_triton

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
PER_LAYER = {"Bert": 4, "Roberta": 4, "Electra": 4, "MPNet": 2}
"""Modules of a layer that are replaced; MPNet's attention ends in a module of its own kind."""


def _model(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    return getattr(transformers, f"{family}ForMaskedLM")(config)


def _run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of two sequences, and the gradients of all parameters."""
    ids = torch.arange(3, 25).view(2, 11)
    model.zero_grad()
    scores = model(input_ids=ids).logits
    scores.square().mean().backward()
    gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    return scores.detach(), gradients


@pytest.mark.parametrize("family", PER_LAYER)
def test_a_patched_model_gives_what_it_gave(family: str) -> None:
    model = _model(family).eval()
    scores, gradients = _run(model)
    names = list(model.state_dict())
    assert patch_modules(model) == 2 * PER_LAYER[family]
    patched_scores, patched_gradients = _run(model)
    torch.testing.assert_close(patched_scores, scores)
    torch.testing.assert_close(patched_gradients, gradients)
    assert list(model.state_dict()) == names


def test_the_fused_operators_are_what_runs(monkeypatch) -> None:
    model = _model("Bert").eval()
    calls: list[str] = []
    for name in ("bias_gelu", "residual_layer_norm"):
        fused = getattr(row_choice, name)
        monkeypatch.setattr(row_choice, name, lambda *a, name=name, fused=fused: calls.append(name) or fused(*a))
    patch_modules(model, "triton")
    _run(model)
    assert sorted(calls) == ["bias_gelu"] * 2 + ["residual_layer_norm"] * 4


def test_bf16_and_autocast_keep_their_dtypes() -> None:
    model = _model("Bert").eval()
    for cast in (False, True):
        twin = copy.deepcopy(model) if cast else copy.deepcopy(model).bfloat16()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
            before, _ = _run(twin)
            patch_modules(twin)
            after, _ = _run(twin)
        assert after.dtype == before.dtype
        torch.testing.assert_close(after, before, rtol=0.05, atol=0.03)


def test_dropout_runs_in_training_only_and_follows_torch_s_seed() -> None:
    model = _model("Bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0)
    model.bert.embeddings.dropout.p = 0.0
    patch_modules(model)
    model.eval()
    plain, _ = _run(model)
    model.train()
    torch.manual_seed(5)
    first, gradients = _run(model)
    second, _ = _run(model)
    torch.manual_seed(5)
    again, gradients_again = _run(model)
    assert first.equal(again)
    assert all(gradients[name].equal(gradients_again[name]) for name in gradients)
    assert not first.equal(second)
    assert not first.equal(plain)


def test_torch_leaves_the_model_alone() -> None:
    model = _model("Bert")
    assert patch_modules(model, "torch") == 0
    assert not any("forward" in vars(part) for part in model.modules())


def test_auto_leaves_a_model_alone_that_triton_cannot_run(monkeypatch) -> None:
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "HAVE_TRITON", False)
    model = _model("Bert")
    assert patch_modules(model) == 0
    with pytest.raises(ValueError, match="needs a model on a GPU"):
        patch_modules(model, "triton")


def test_a_second_call_changes_nothing() -> None:
    model = _model("Bert").eval()
    assert patch_modules(model) == patch_modules(model, "triton")
    scores, _ = _run(model)
    torch.testing.assert_close(scores, _run(_model("Bert").eval())[0])


def test_a_copy_of_a_patched_model_uses_its_own_weights() -> None:
    model = _model("Bert").eval()
    patch_modules(model)
    scores, _ = _run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for part in model.parameters():
            part.zero_()
    torch.testing.assert_close(_run(twin)[0], scores)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_another_activation_is_left_as_it_is(activation: str) -> None:
    model = _model("Bert", hidden_act=activation).eval()
    scores, _ = _run(model)
    assert patch_modules(model) == 6
    torch.testing.assert_close(_run(model)[0], scores)


def test_modules_that_only_look_alike_are_left_as_they_are() -> None:
    class BertOutput(nn.Module):
        """The parts of BERT's, but LayerNorm first."""

        def __init__(self) -> None:
            super().__init__()
            self.dense, self.LayerNorm, self.dropout = nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.0)

        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            return self.dropout(self.dense(self.LayerNorm(hidden_states))) + input_tensor

    assert patch_modules(nn.Sequential(BertOutput())) == 0


def test_replaced_parts_are_left_as_they_are() -> None:
    class Adapted(nn.Linear):
        """A Linear with something added, as adapters do."""

    model = _model("Bert")
    layer = model.bert.encoder.layer[0]
    layer.attention.self.value = Adapted(32, 32)
    layer.output.dense = Adapted(48, 32)
    layer.attention.output.LayerNorm = nn.Identity()
    layer.intermediate.intermediate_act_fn = nn.GELU(approximate="tanh")
    assert patch_modules(model) == 4


def test_the_projection_of_a_decoder_is_left_as_it_is() -> None:
    model = _model("Bert", is_decoder=True)
    assert patch_modules(model) == 2 * 3


def test_attention_is_given_one_tensor_of_which_q_k_v_are_views() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    given: list[tuple[Tensor, ...]] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(layer, query, key, value, mask, *, qkv=None, **keywords):
        given.append((query, key, value, qkv))
        return sdpa(layer, query, key, value, mask, **keywords)

    model = _model("Bert").eval()
    model.config._attn_implementation = "watched"
    patch_modules(model)
    ALL_ATTENTION_FUNCTIONS.register("watched", watched)
    try:
        _run(model)
    finally:
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping["watched"]
    assert len(given) == 2
    for query, key, value, qkv in given:
        assert qkv.shape == (2, 11, 3, 2, 16)
        for index, part in enumerate((query, key, value)):
            assert part.equal(qkv[:, :, index].transpose(1, 2))
            assert part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


def test_modernbert_has_nothing_to_replace_and_runs_as_before() -> None:
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    model = _model("ModernBert", **ids).eval()
    scores, _ = _run(model)
    assert patch_modules(model, "triton") == 0
    assert _run(model)[0].equal(scores)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="choose auto, triton or torch"):
        patch_modules(nn.Linear(2, 2), "cuda")  # type: ignore[arg-type]


def test_weights_of_a_patched_model_load_into_another() -> None:
    model = _model("Roberta").eval()
    patch_modules(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = _model("Roberta").eval()
    fresh.load_state_dict(torch.load(file))
    torch.testing.assert_close(_run(fresh)[0], _run(model)[0])
