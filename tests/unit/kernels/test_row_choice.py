"""LayerNorm and GELU as cases of a measured choice, and a patched layer that goes by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertLayer
from unit.kernels.bounds import needs_triton

from fedbert_kernels import compiled_rows, gelu, layer_norm, patch_modules, row_choice
from fedbert_kernels.choice import OURS
from fedbert_kernels.row_choice import COMPILED, GELU, LAYER_NORM, RowCase

pytestmark = needs_triton

CPU = torch.device("cpu")
NORM, ACTIVATION = RowCase(LAYER_NORM, torch.bfloat16, 32, 0.1), RowCase(GELU, torch.bfloat16, 48)


def test_a_case_is_known_by_all_that_decides_it() -> None:
    others = [RowCase(LAYER_NORM, torch.bfloat16, 32), RowCase(LAYER_NORM, torch.float32, 32, 0.1), ACTIVATION]
    assert len({case.name for case in [NORM, *others, RowCase(LAYER_NORM, torch.bfloat16, 64, 0.1)]}) == 5
    assert RowCase(LAYER_NORM, torch.bfloat16, 32, 0.2).name == NORM.name


def test_both_ways_are_there_and_a_tie_is_torch_compile_s() -> None:
    assert list(NORM.releases()) == [OURS, COMPILED] and NORM.missing() == {}
    assert NORM.default == COMPILED


@pytest.mark.parametrize("case", [NORM, ACTIVATION, RowCase(LAYER_NORM, torch.float32, 20)], ids=lambda case: case.name)
def test_a_timed_step_is_forward_and_backward_of_the_operator(case: RowCase) -> None:
    module = gelu if case.kernel == GELU else layer_norm
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch_forward", watch(calls, "forward", module.launch_forward))
        patch.setattr(module, "launch_backward", watch(calls, "backward", module.launch_backward))
        gradients = case.step(OURS, CPU, num_rows=8)()
    assert calls == ["forward", "backward"]
    assert gradients[0].shape == (8, case.width) and gradients[0].dtype == case.dtype
    assert [gradient.shape for gradient in gradients[2 if case.kernel == LAYER_NORM else 1 :]] == [(case.width,)] * (
        3 if case.kernel == LAYER_NORM else 1
    )


def watch(calls: list[str], name: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function, which also writes down that it ran."""
    return lambda *arguments: calls.append(name) or function(*arguments)


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=48, attn_implementation="sdpa")
    return BertLayer(config).eval()


def test_a_patched_layer_runs_who_was_faster_for_its_widths_and_dtype(layer, monkeypatch) -> None:
    """And gives what it gave, whoever it is."""
    x = torch.randn(1, 5, 32)
    expected = layer(x)
    asked: list[RowCase] = []
    ran: list[str] = []
    for name in ("compiled_bias_gelu", "compiled_residual_layer_norm"):
        plain = getattr(compiled_rows, name.replace("compiled", ""))
        monkeypatch.setattr(row_choice, name, watch(ran, name, plain))
    for name in ("bias_gelu", "residual_layer_norm"):
        monkeypatch.setattr(row_choice, name, watch(ran, name, getattr(row_choice, name)))
    for ours in ({LAYER_NORM: True, GELU: False}, {LAYER_NORM: False, GELU: True}):

        def answer(cases, device, ours=ours):
            asked.extend(cases)
            return {case.name: OURS if ours[case.kernel] else COMPILED for case in asked}

        monkeypatch.setattr(patch_modules, "kept", answer)
        asked.clear()
        ran.clear()
        assert patch_modules.patch_modules(layer, "auto", torch.bfloat16) == 4
        assert set(asked) == {NORM, ACTIVATION}
        torch.testing.assert_close(layer(x), expected)
        prefixes = {kernel: "" if is_ours else "compiled_" for kernel, is_ours in ours.items()}
        norm, activation = f"{prefixes[LAYER_NORM]}residual_layer_norm", f"{prefixes[GELU]}bias_gelu"
        assert ran == [norm, activation, norm]


def test_without_a_dtype_that_of_the_parameters_counts(layer, monkeypatch) -> None:
    asked: list[RowCase] = []
    monkeypatch.setattr(
        patch_modules,
        "kept",
        lambda cases, _: asked.extend(cases) or dict.fromkeys((case.name for case in asked), OURS),
    )
    patch_modules.patch_modules(layer.half(), "auto")
    assert {case.dtype for case in asked} == {torch.float16}


def test_triton_is_ours_and_measures_nothing(layer, monkeypatch) -> None:
    def kept(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(patch_modules, "kept", kept)
    assert patch_modules.patch_modules(layer, "triton") == 4
