"""Whether LayerNorm and GELU are ours or torch.compile's on a card: what was measured there decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit.kernels.bounds import needs_triton

from fedbert_ds.bench.kernels import choice_times
from fedbert_kernels import row_choice
from fedbert_kernels.row_choice import GELU, LAYER_NORM, choices_path, keep_choices, shape_class

pytestmark = needs_triton

NAMES = [shape_class(GELU, torch.float32, 12, 0.0), shape_class(LAYER_NORM, torch.float32, 12, 0.1)]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A card without choices, on which tensors of the CPU pretend to be; torch.compile is left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(row_choice, "capability", lambda _: 90)
    monkeypatch.setattr(row_choice, "compiled", lambda function: function)
    row_choice._beaten_on.cache_clear()
    yield choices_path(0)
    row_choice._beaten_on.cache_clear()


class OnCard(Tensor):
    """Says that it is on a card."""

    is_cuda = True  # type: ignore[assignment]


def used(monkeypatch: pytest.MonkeyPatch, on_card: bool = True) -> list[str]:
    """Whose GELU and LayerNorm run for fp32 of width 12, with dropout."""
    calls: list[str] = []
    for name in ("bias_gelu", "residual_layer_norm", "_bias_gelu", "_residual_layer_norm"):
        monkeypatch.setattr(row_choice, name, lambda *_, name=name: calls.append(name))
    x, vector = torch.ones(3, 12), torch.ones(12)
    x = x.as_subclass(OnCard) if on_card else x
    row_choice.fused_bias_gelu(x, vector)
    row_choice.fused_residual_layer_norm(x, x, vector, vector, vector, 0.1, 1e-12)
    return calls


def test_what_was_faster_runs(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert used(monkeypatch) == ["bias_gelu", "residual_layer_norm"], "nothing was measured"
    kept = keep_choices({NAMES[0]: (1.0, 0.5), NAMES[1]: (1.0, 2.0), "GELU bfloat16 12": (1.0, 0.99)}, 0)
    assert list(kept.values()) == [False, True, True], "one per cent is noise"
    assert used(monkeypatch) == ["_bias_gelu", "residual_layer_norm"]
    assert used(monkeypatch, on_card=False) == ["bias_gelu", "residual_layer_norm"]
    keep_choices({NAMES[1]: (1.0, 0.5)}, 0)
    assert used(monkeypatch) == ["_bias_gelu", "_residual_layer_norm"], "what was not measured anew stays"
    keep_choices(dict.fromkeys(NAMES, (1.0, 1.5)), 0)
    assert used(monkeypatch) == ["bias_gelu", "residual_layer_norm"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"kernels": 3, "beaten": 4}', '{"kernels": "other", "beaten": []}']
)
def test_a_file_that_says_nothing_of_these_kernels(card: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    keep_choices({NAMES[0]: (1.0, 0.5)}, 0)
    changed = json.dumps({**json.loads(card.read_text()), "kernels": "of another release"})
    for text in (content, changed):
        card.write_text(text)
        row_choice._beaten_on.cache_clear()
        assert used(monkeypatch) == ["bias_gelu", "residual_layer_norm"]


def test_what_runs_instead_computes_the_same() -> None:
    """As the swapped modules did before they were swapped: the residual stream in one dtype, weights in fp32."""
    random = torch.Generator().manual_seed(1)
    x, residual, bias, weight, shift = (torch.randn(*size, generator=random) for size in [(5, 12)] * 2 + [(12,)] * 3)
    got = row_choice._residual_layer_norm(x, residual, bias, weight, shift, 0.0, 1e-12)
    torch.testing.assert_close(got, row_choice.residual_layer_norm(x, residual, bias, weight, shift))
    torch.testing.assert_close(row_choice._bias_gelu(x, bias), row_choice.bias_gelu(x, bias))
    half = row_choice._residual_layer_norm(x.bfloat16(), residual.bfloat16(), bias, weight, shift, 0.0, 1e-12)
    assert half.dtype == torch.bfloat16 and row_choice._bias_gelu(x.bfloat16(), bias).dtype == torch.bfloat16
    torch.manual_seed(0)
    dropped = row_choice._residual_layer_norm(x, residual, bias, weight, shift, 0.5, 1e-12)
    assert not torch.equal(dropped, got)


def test_times_are_those_of_both_ways_of_the_two_kernels() -> None:
    def row(kernel: str, rival: str, way: str, milliseconds: float | None, **more: object) -> dict[str, object]:
        time = {"reason": "not installed"} if milliseconds is None else {"milliseconds": milliseconds}
        fields = {"kernel": kernel, "rival": rival, "pass": way, "dtype": "bfloat16", "width": 768, "dropout": 0.0}
        return fields | time | more

    rows = [
        row("GELU", "ours", "forward", 9.0), row("GELU", "ours", "forward + backward", 1.0),
        row("GELU", "torch", "forward + backward", 3.0), row("GELU", "torch.compile", "forward + backward", 2.0),
        row("layer norm", "ours", "forward + backward", 4.0, dropout=0.1),
        row("layer norm", "torch.compile", "forward + backward", None, dropout=0.1),
        row("attention", "ours", "forward + backward", 1.0),
    ]  # fmt: skip
    assert choice_times(rows) == {"GELU bfloat16 768": (1.0, 2.0)}
