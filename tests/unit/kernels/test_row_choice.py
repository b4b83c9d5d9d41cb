"""LayerNorm and GELU on a card are ours or torch.compile's by its measurements alone."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertLayer
from unit.kernels.bounds import needs_triton

from fedbert_kernels import compiled_rows, gelu, layer_norm, patch_modules, row_choice
from fedbert_kernels.row_choice import GELU, LAYER_NORM, RowCase, choices_path, keep, kept, measure_again, training_step

pytestmark = needs_triton

CARD = torch.device("cuda", 0)
NORM, ACTIVATION = RowCase(LAYER_NORM, torch.bfloat16, 32, 0.1), RowCase(GELU, torch.bfloat16, 48)
Measured = list[str]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a card on which nothing was measured yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(row_choice, "capability", lambda _: 90)
    return choices_path(0)


@pytest.fixture
def timed(card: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measured]:
    """Sets a measurement's result by kernel; the list it returns names the measured cases."""

    def set_times(**times: tuple[float, float]) -> Measured:
        measured: Measured = []
        by_kernel = {GELU: times.get("gelu"), LAYER_NORM: times.get("norm")}
        monkeypatch.setattr(
            row_choice, "measure", lambda case, index: measured.append(case.name) or by_kernel[case.kernel]
        )
        return measured

    return set_times


def test_only_the_kernel_that_was_faster_is_kept(timed) -> None:
    measured = timed(gelu=(1.0, 0.5), norm=(1.0, 2.0))
    assert kept([NORM, ACTIVATION], CARD) == {NORM.name: True, ACTIVATION.name: False}
    assert measured == [NORM.name, ACTIVATION.name]


@pytest.mark.parametrize(("ours", "is_kept"), [(0.96, True), (0.98, False), (1.0, False), (1.1, False)])
def test_a_tie_is_torch_compile_s(timed, ours: float, is_kept: bool) -> None:
    timed(norm=(ours, 1.0))
    assert kept([NORM], CARD) == {NORM.name: is_kept}


def test_a_case_is_measured_once_for_a_card(timed) -> None:
    timed(gelu=(1.0, 0.5), norm=(1.0, 2.0))
    first = kept([NORM, NORM, ACTIVATION], CARD)
    measured = timed(gelu=(1.0, 2.0), norm=(1.0, 0.5))
    assert kept([NORM, ACTIVATION], torch.device("cuda")) == first
    assert measured == []
    without_dropout, in_fp32 = RowCase(LAYER_NORM, torch.bfloat16, 32), RowCase(LAYER_NORM, torch.float32, 32, 0.1)
    assert kept([NORM, without_dropout, in_fp32], CARD) == {
        NORM.name: True, without_dropout.name: False, in_fp32.name: False
    }  # fmt: skip
    assert measured == [without_dropout.name, in_fp32.name], "only what nobody had measured"


def test_who_waited_for_another_process_reads_what_that_one_wrote(timed, card: Path, monkeypatch) -> None:
    measured = timed(norm=(1.0, 0.5))

    class Lock:
        """Another process has it, and writes the file before it lets go."""

        def __init__(self, path: Path, timeout: float) -> None:
            assert path.parent == card.parent

        def __enter__(self) -> None:
            keep({NORM.name: (1.0, 2.0)}, 0)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(row_choice, "FileLock", Lock)
    assert kept([NORM], CARD) == {NORM.name: True}
    assert measured == []


def test_a_process_that_holds_the_lock_for_too_long_is_not_waited_for(timed, card: Path, monkeypatch) -> None:
    measured = timed(norm=(1.0, 2.0))
    monkeypatch.setattr(row_choice, "LONGEST_WAIT", 0.1)
    card.parent.mkdir(parents=True)
    with FileLock(card.with_suffix(".lock")):
        assert kept([NORM], CARD) == {NORM.name: True}
    assert measured == [NORM.name]


def test_processes_that_start_together_measure_once(tmp_path: Path) -> None:
    program = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from fedbert_kernels import row_choice as m\n"
        "torch.cuda.get_device_name = lambda _: 'A Card'\n"
        "m.capability = lambda _: 90\n"
        "def measure(case, index):\n"
        "    Path(sys.argv[1], sys.argv[2]).touch()\n"
        "    time.sleep(1.0)\n"
        "    return 1.0, float(sys.argv[2])\n"
        "m.measure = measure\n"
        "print(m.kept([m.RowCase(m.GELU, torch.float32, 8)], torch.device('cuda', 0)))\n"
    )
    marks = tmp_path / "marks"
    marks.mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    # One would keep our kernel and the other would not: they must agree.
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(marks), theirs], env=environment, stdout=subprocess.PIPE)
        for theirs in ("0.5", "2.0")
    ]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    assert len(answers) == 1
    assert len(list(marks.iterdir())) == 1
    assert all(process.returncode == 0 for process in processes)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kernels": 3, "kept": 4}', '{"kernels": "other", "kept": {}}'])
def test_a_file_that_says_nothing_of_these_kernels_is_measured_over(timed, card: Path, content: str) -> None:
    keep({NORM.name: (2.0, 1.0)}, 0)
    of_other_code = json.dumps({**json.loads(card.read_text()), "kernels": "of another release"})
    for text in (content, of_other_code):
        measured = timed(norm=(1.0, 2.0))
        card.write_text(text)
        assert kept([NORM], CARD) == {NORM.name: True}
        assert measured == [NORM.name]


def test_a_new_measurement_replaces_an_old_one_and_no_other(timed, card: Path) -> None:
    timed(gelu=(1.0, 2.0), norm=(1.0, 2.0))
    kept([NORM, ACTIVATION], CARD)
    measured = timed(norm=(1.0, 0.5))
    assert measure_again([NORM], CARD) == {NORM.name: (1.0, 0.5)}
    assert measured == [NORM.name]
    timed()
    assert kept([NORM, ACTIVATION], CARD) == {NORM.name: False, ACTIVATION.name: True}
    assert [path.name for path in card.parent.iterdir() if path.suffix == ".part"] == []


def test_what_does_not_run_loses_but_is_tried_again_next_time(timed) -> None:
    for times, is_kept in (((1.0, math.inf), True), ((math.inf, 1.0), False), ((math.inf, math.inf), False)):
        measured = timed(norm=times)
        assert kept([NORM], CARD) == {NORM.name: is_kept}
        assert measured == [NORM.name]


def test_where_no_file_can_be_written_a_run_starts_all_the_same(timed, card: Path, caplog) -> None:
    card.parent.parent.mkdir(parents=True)
    card.parent.write_text("a file where the folder should be")
    timed(norm=(1.0, 2.0))
    with caplog.at_level(logging.WARNING):
        assert kept([NORM], CARD) == {NORM.name: True}
    assert "cannot be written" in caplog.text


def test_off_a_gpu_nothing_is_measured(timed) -> None:
    measured = timed()
    assert kept([NORM, ACTIVATION], torch.device("cpu")) == {NORM.name: True, ACTIVATION.name: True}
    assert measured == []


def test_a_measurement_times_both_and_leaves_torch_s_random_numbers_alone(monkeypatch, caplog) -> None:
    """One that fails is told, and infinitely slow."""
    import triton.testing

    ran: list[str] = []

    def fails(*_: object) -> None:
        raise RuntimeError("no C compiler\nand much more")

    def computes(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ran.append(str(x.dtype))
        return x * 2.0 + bias

    step = row_choice.training_step
    monkeypatch.setattr(row_choice, "training_step", lambda case, ours, device: step(case, ours, "cpu", 1 << 14))
    monkeypatch.setattr(row_choice, "operator", lambda kernel, ours: computes if ours else fails)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, return_mode: call() and 3.0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.device("cpu"))
    # Without a GPU there is only the CPU's generator to leave alone.
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, fork=torch.random.fork_rng: fork(devices=[]))
    before = torch.get_rng_state()
    assert row_choice.measure(ACTIVATION, 0) == (3.0, math.inf)
    assert ran == ["torch.bfloat16"]
    assert torch.equal(torch.get_rng_state(), before)
    assert "torch.compile's does not run here: no C compiler" in caplog.text and "much more" not in caplog.text


@pytest.mark.parametrize("case", [NORM, ACTIVATION, RowCase(LAYER_NORM, torch.float32, 20)], ids=lambda case: case.name)
def test_a_timed_step_is_forward_and_backward_of_the_operator(case: RowCase) -> None:
    module = gelu if case.kernel == GELU else layer_norm
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch_forward", watch(calls, "forward", module.launch_forward))
        patch.setattr(module, "launch_backward", watch(calls, "backward", module.launch_backward))
        gradients = training_step(case, True, "cpu", num_rows=8)()
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
            return {case.name: ours[case.kernel] for case in asked}

        monkeypatch.setattr(patch_modules, "kept", answer)
        asked.clear()
        ran.clear()
        assert patch_modules.patch_modules(layer, "triton", torch.bfloat16) == 4
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
        lambda cases, _: asked.extend(cases) or dict.fromkeys((case.name for case in asked), True),
    )
    patch_modules.patch_modules(layer.half(), "triton")
    assert {case.dtype for case in asked} == {torch.float16}
