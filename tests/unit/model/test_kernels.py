"""A body with Triton kernels equals the body without; where they run and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.kernels.bounds import DEVICE, needs_triton
from unit.model.samples import Packed, pack

from fedbert_ds.errors import ConfigError
from fedbert_ds.model.cut import split
from fedbert_ds.model.kernels import check_kernels, install_kernels

pytestmark = needs_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [7, 1, 16, 7]


@pytest.fixture
def body_of(small_model):
    """Builds a body with heads of 16, the kernels' smallest, on the device that runs them."""

    def build(architecture: str, cut: Any = "embeddings", **changes: Any) -> Any:
        # Far from the small weights of a start, so that attention has something to say.
        _, body = split(small_model(architecture, hidden_size=32, initializer_range=0.2, **changes).train(), cut)
        return body.to(DEVICE)

    return build


def run(body: Any, packed: Packed) -> dict[str, Tensor]:
    """Hidden states of masked positions, and the gradients of the input and of all parameters."""
    generator = torch.Generator().manual_seed(6)
    num_tokens = len(packed.input_ids)
    values = torch.randn(num_tokens, body.widths.activations, generator=generator).to(DEVICE).requires_grad_()
    weights = torch.randn(len(packed.masked), body.widths.hidden, generator=generator).to(DEVICE)
    row_index = torch.arange(num_tokens, device=DEVICE) if body.cut == "rows" else None
    body.zero_grad()
    hidden = body(values, packed.masked.to(DEVICE), packed.cu_seqlens, row_index)
    (hidden * weights).sum().backward()
    assert values.grad is not None
    gradients = {name: parameter.grad.clone() for name, parameter in body.named_parameters()}
    return {"hidden": hidden.detach(), "input": values.grad} | gradients


def num_replaced(body: Any) -> int:
    return sum("forward" in vars(module) for module in body.modules())


def test_the_same_hidden_states_and_gradients(body_of, architecture, cut) -> None:
    body, packed = body_of(architecture, cut), pack(LENGTHS)
    expected = run(body, packed)
    install_kernels(body, "triton", torch.device(DEVICE))
    torch.testing.assert_close(run(body, packed), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_attention_s_kernels_themselves_in_the_body(body_of, monkeypatch, kind: str) -> None:
    """Two layers, since the second finds what the first remembered of the bounds; ModernBERT's has
    a window.
    """
    # On a CPU the operator has a body in torch; here it gives way to the kernels, interpreted.
    from fedbert_kernels import attention as module

    monkeypatch.setattr(module.attention_torch, "forward", module.launch_forward)
    monkeypatch.setattr(module.attention_torch, "backward", module.launch_backward)
    body, packed = body_of(kind, num_hidden_layers=2), pack([7, 1, 7])
    expected = run(body, packed)
    for _ in range(2):
        install_kernels(body, "triton", torch.device(DEVICE))
        torch.testing.assert_close(run(body, packed), expected, atol=2e-4, rtol=1e-4)


def test_attention_is_given_the_packed_projection_and_bounds_nobody_looks_at(body_of, monkeypatch) -> None:
    from fedbert_kernels import attention as module
    from fedbert_kernels import attention_choice, sequences

    shapes: list[Any] = []

    def watched(inputs: Any, *arguments: Any, **keywords: Any) -> Tensor:
        shapes.append(inputs.shape if isinstance(inputs, Tensor) else [part.shape for part in inputs])
        return module.attention(inputs, *arguments, **keywords)

    def look(*_: Any) -> None:
        raise AssertionError("on a GPU, this waits for the device")

    monkeypatch.setattr(attention_choice, "attention", watched)
    monkeypatch.setattr(sequences, "read_bounds", look)
    packed = pack(LENGTHS)
    body = body_of("bert")
    install_kernels(body, "triton", torch.device(DEVICE))
    run(body, packed)
    body = body_of("bert")
    install_kernels(body, "triton", torch.device(DEVICE))
    for patched in body.modules():
        vars(patched).pop("forward", None)  # as modules that are not patched call it
    run(body, packed)
    assert shapes == [(31, 3, 2, 16)] * 3 + [[(31, 2, 16)] * 3] * 3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_patched_modules_are_told_in_which_dtype_they_will_run(body_of, monkeypatch, dtype) -> None:
    from fedbert_kernels import patch_modules

    told: list[Any] = []
    monkeypatch.setattr(patch_modules, "patch_modules", lambda *given, recompute: told.append((*given, recompute)))
    body = body_of("bert")
    install_kernels(body, "triton", torch.device(DEVICE), dtype=dtype)
    body.recompute("elementwise")
    install_kernels(body, "triton", torch.device(DEVICE), dtype=dtype)
    assert told == [(body, "triton", dtype, False), (body, "triton", dtype, True)]


def test_modules_are_patched_once(body_of) -> None:
    body = body_of("bert")
    for _ in range(2):
        install_kernels(body, "triton", torch.device(DEVICE))
        assert body.attend is not None and num_replaced(body) == 3 * 4


@pytest.mark.parametrize("what", ["elementwise", "layers"])
def test_dropout_follows_the_seed_and_is_repeated_by_recomputation(body_of, what: Any) -> None:
    packed = pack(LENGTHS)
    kept, recomputed = (body_of("bert", dropout=0.3) for _ in range(2))
    recomputed.recompute(what)
    results = []
    for body, seed in ((kept, 1), (recomputed, 1), (kept, 2)):
        install_kernels(body, "triton", torch.device(DEVICE))
        torch.manual_seed(seed)
        results.append(run(body, packed))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)
    assert not torch.equal(results[2]["hidden"], results[0]["hidden"])


def test_of_codes_that_fused_gelu_takes_gradients_alone_are_rounded(body_of) -> None:
    packed, results = pack(LENGTHS), []
    for what in ("elementwise", "int8"):
        body = body_of("bert", dropout=0.3)
        body.recompute(what)
        install_kernels(body, "triton", torch.device(DEVICE))
        torch.manual_seed(1)
        results.append(run(body, packed))
    exact, rounded = results
    assert torch.equal(rounded.pop("hidden"), exact.pop("hidden"))
    apart = sum(float((rounded[name] - gradient).square().sum()) for name, gradient in exact.items())
    assert 0.0 < apart < 1e-4 * sum(float(gradient.square().sum()) for gradient in exact.values())


def test_torch_is_what_a_cpu_runs_unless_triton_is_asked_for(body_of) -> None:
    # Here Triton's interpreter could run them, a thousand times slower.
    for kernels in ("auto", "torch"):
        body = body_of("bert")
        install_kernels(body, kernels, CPU)
        assert body.attend is None and num_replaced(body) == 0


@pytest.fixture
def measured(monkeypatch) -> Iterator[list[Any]]:
    """The cases that a choice on a GPU was asked for; the answers are `beaten`'s."""
    from fedbert_kernels import choice, patch_modules

    asked: list[Any] = []

    def kept(cases: Any, device: torch.device) -> dict[str, str]:
        assert device == CUDA or device == torch.device(DEVICE)
        asked.extend(cases)
        return {case.name: case.off_gpu for case in asked}

    for module in (choice, patch_modules):
        monkeypatch.setattr(module, "kept", kept)
    yield asked


def test_auto_takes_triton_on_a_gpu_that_has_it(body_of, measured, monkeypatch) -> None:
    from fedbert_kernels import interpreter

    body = body_of("bert")
    install_kernels(body, "auto", CUDA)
    assert body.attend is not None and num_replaced(body) == 3 * 4
    monkeypatch.setattr(interpreter, "HAVE_TRITON", False)
    body = body_of("bert")
    install_kernels(body, "auto", CUDA)
    assert body.attend is None and num_replaced(body) == 0


def test_auto_measures_for_what_will_run_and_triton_measures_nothing(body_of, measured) -> None:
    from fedbert_kernels.attention_choice import AttentionCase

    body = body_of("bert", dropout=0.3)
    install_kernels(body, "triton", torch.device(DEVICE), longest=300)
    assert measured == []
    install_kernels(body, "auto", CUDA, dtype=torch.bfloat16, longest=300)
    assert measured[0] == AttentionCase(torch.bfloat16, 2, 16, 0.3, 300)
    assert {case.dtype for case in measured} == {torch.bfloat16} and len(measured) == 1 + 3 * 3
    measured.clear()
    install_kernels(body, "auto", CUDA)
    longest = body.config.max_position_embeddings
    assert measured[0] == AttentionCase(torch.float32, 2, 16, 0.3, longest)


def test_the_attention_that_was_faster_runs_in_the_body(body_of, monkeypatch) -> None:
    from fedbert_kernels import choice
    from fedbert_kernels.attention import attention
    from fedbert_kernels.attention_rivals import RIVALS, Rival

    calls: list[int] = []

    def rival(*arguments: Any, **keywords: Any) -> Tensor:
        calls.append(1)
        return attention(*arguments, **keywords)

    body, packed = body_of("bert"), pack(LENGTHS)
    expected = run(body, packed)
    monkeypatch.setitem(RIVALS, "a rival", Rival(rival, has_dropout=True))
    monkeypatch.setattr(choice, "kept", lambda cases, _: {case.name: "a rival" for case in cases})
    install_kernels(body, "auto", CUDA)
    torch.testing.assert_close(run(body, packed), expected, atol=2e-4, rtol=1e-4)
    assert len(calls) == 3


def test_triton_where_it_cannot_run_is_one_line(monkeypatch) -> None:
    from fedbert_kernels import interpreter

    monkeypatch.setattr(interpreter, "INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"kernels: triton needs a GPU.* set kernels: auto"):
        check_kernels("triton", CPU)
    monkeypatch.setattr(interpreter, "HAVE_TRITON", False)
    with pytest.raises(ConfigError, match="needs the triton package; pip install triton"):
        check_kernels("triton", torch.device("cuda"))
    for kernels in ("auto", "torch"):
        check_kernels(kernels, CPU)


def test_a_head_size_the_kernel_does_not_take(small_model, measured) -> None:
    body = split(small_model("bert"), "embeddings")[1].to(DEVICE)
    with pytest.raises(ConfigError, match=r"kernels: triton takes heads of 16 to 128, but .* is 8; set kernels: auto"):
        install_kernels(body, "triton", torch.device(DEVICE))
    install_kernels(body, "auto", CUDA)
    assert body.attend is None and num_replaced(body) == 3 * 4
