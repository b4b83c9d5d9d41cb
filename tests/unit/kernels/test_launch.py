"""Tuned launches: the candidate that wins, files that are trusted, launches that attention uses."""

import json

import pytest
import torch

from fedbert_kernels import attention_launches, attention_tuning
from fedbert_kernels.attention_launches import KERNELS, choose, launches, shape_class
from fedbert_kernels.interpreter import HAVE_TRITON
from fedbert_kernels.launch import Launch, digest, fastest, read_table, table_path, write_table

DEFAULT, FAST, SLOW, WRONG = (Launch(64, 64, 4, stages) for stages in (1, 2, 3, 4))


def choose_with(times: dict[Launch, float]) -> tuple[Launch, float]:
    def seconds(launch: Launch) -> float:
        if launch not in times:
            raise RuntimeError("out of resource: shared memory")
        return times[launch]

    return fastest(DEFAULT, [DEFAULT, SLOW, WRONG, FAST], seconds)


@pytest.mark.parametrize(
    ("times", "launch", "share"),
    [
        ({DEFAULT: 1.0, FAST: 0.5, SLOW: 0.8}, FAST, 0.5),
        ({DEFAULT: 1.0, FAST: 0.98, SLOW: 1.5}, DEFAULT, 1.0),
        ({DEFAULT: 2.0}, DEFAULT, 1.0),
        ({DEFAULT: 2.0, SLOW: 1.0}, SLOW, 0.5),
    ],
)
def test_the_fastest_wins_if_it_is_clearly_faster_and_works(times, launch: Launch, share: float) -> None:
    assert choose_with(times) == (launch, share)


def test_a_default_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        choose_with({FAST: 1.0})


def test_a_file_is_read_as_written_and_added_to(tmp_path) -> None:
    path = tmp_path / "launches" / "card.json"
    capped = Launch(128, 64, 8, 2, 255)
    write_table(path, "kernels", {"a": FAST, "b": SLOW})
    write_table(path, "kernels", {"b": capped})
    assert read_table(path, "kernels") == {"a": FAST, "b": capped}
    assert [entry.name for entry in path.parent.iterdir()] == ["card.json"]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        '{"kernels": "kernels"}',
        '{"kernels": "kernels", "launches": {"a": 3}}',
        '{"kernels": "kernels", "launches": {"a": {"rows": 64}}}',
        '{"kernels": "others", "launches": {"a": {"rows": 64, "columns": 64, "warps": 4, "stages": 1}}}',
    ],
)
def test_what_cannot_be_read_or_is_of_other_kernels_says_nothing(text, tmp_path) -> None:
    path = tmp_path / "card.json"
    if text is not None:
        path.write_text(text)
    assert read_table(path, "kernels") == {}
    write_table(path, "kernels", {"a": FAST})
    assert read_table(path, "kernels") == {"a": FAST}


def test_a_file_is_of_one_card_and_release(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = table_path("NVIDIA H100 80GB HBM3", 90, "3.9.0")
    assert path == tmp_path / "fedbert-ds" / "launches" / "nvidia-h100-80gb-hbm3-sm90-triton-3.9.0.json"
    others = {table_path("NVIDIA H200", 90, "3.9.0"), table_path("NVIDIA H100 80GB HBM3", 90, "3.6.0")}
    assert path not in others and len(others) == 2


def test_other_sources_have_another_digest(tmp_path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("a")
    before = digest(source)
    source.write_text("b")
    assert digest(source) != before


# ---- of the attention kernels ----

SHAPE = (torch.bfloat16, 64, True, False)


def test_the_table_is_used_where_it_has_the_shape() -> None:
    written = launches(64, torch.bfloat16, False, 90)
    table = {f"backward_q {shape_class(*SHAPE, 512, 4)}": FAST}
    assert choose(table, written, *SHAPE, 512, 4) == (written[0], FAST, written[2])
    assert choose(table, written, *SHAPE, 4096, 4) == written, "longer sequences"
    assert choose(table, written, torch.float16, *SHAPE[1:], 512, 4) == written
    assert choose(table, written, torch.bfloat16, 64, False, False, 512, 4) == written, "no dropout"
    assert choose({}, written, *SHAPE, 512, 4) == written


def test_shape_classes() -> None:
    assert shape_class(*SHAPE, 0, 0) == shape_class(*SHAPE, 30, 1) == "bfloat16 d64 dropout short"
    assert shape_class(torch.float32, 80, False, True, 5120, 10) == "float32 d128 sliding_window long"
    assert shape_class(*SHAPE, 1280, 10).endswith("medium")


def test_candidates_are_launches_that_kernels_can_take() -> None:
    found = list(attention_tuning.candidates(DEFAULT))
    assert found[0] == DEFAULT and len(found) > 10
    assert all(launch.rows % 16 == launch.columns % 16 == 0 for launch in found)


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets every candidate")
def test_every_kernel_gets_the_candidate_that_measures_fastest(monkeypatch) -> None:
    """The kernels run, in the interpreter; only their times are made up."""
    wanted = [Launch(32, 32, 4, 1), Launch(32, 64, 4, 1)]
    times = iter([3.0, 1.0, 2.0] * 3)
    monkeypatch.setattr(attention_tuning, "candidates", lambda default: [default, wanted[0], wanted[1]])
    found = attention_tuning.choose_all(
        [50], 1, 16, torch.float16, 0.1, None, (DEFAULT,) * 3, lambda call: next(times), device="cpu"
    )
    assert [launch for launch, _ in found] == [wanted[0]] * 3
    assert [share for _, share in found] == [pytest.approx(1 / 3)] * 3


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets every candidate")
def test_a_candidate_with_other_results_is_never_chosen(monkeypatch) -> None:
    times = iter([3.0, 1.0] * 3)
    forward = attention_tuning.launch_forward

    def spoiled(*arguments):
        out, lse = forward(*arguments)
        return (out * 1.5 if arguments[-1] == FAST else out), lse

    monkeypatch.setattr(attention_tuning, "launch_forward", spoiled)
    monkeypatch.setattr(attention_tuning, "candidates", lambda default: [default, FAST])
    found = attention_tuning.choose_all(
        [20], 1, 16, torch.float32, 0.0, None, (DEFAULT,) * 3, lambda call: next(times), device="cpu"
    )
    assert found[0] == (DEFAULT, 1.0)


@pytest.mark.skipif(not HAVE_TRITON, reason="a file is of one release of Triton")
def test_tuning_writes_the_card_s_file_and_is_used_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (attention_launches, attention_tuning):
        monkeypatch.setattr(module, "capability", lambda _: 90)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(attention_tuning, "choose_all", lambda *_: [(FAST, 0.5), (SLOW, 0.9), (DEFAULT, 1.0)])
    attention_launches.tuned.cache_clear()
    try:
        assert attention_launches.tuned(0) == {}
        found = attention_tuning.tune([128] * 4, 2, 64, torch.bfloat16, 0.1, torch.device("cuda"))
        names = [f"{kernel} bfloat16 d64 dropout medium" for kernel in KERNELS]
        assert found == dict(zip(names, [(FAST, 0.5), (SLOW, 0.9), (DEFAULT, 1.0)], strict=True))
        assert attention_launches.tuned(0) == dict(zip(names, [FAST, SLOW, DEFAULT], strict=True))
        (path,) = (tmp_path / "fedbert-ds" / "launches").iterdir()
        assert json.loads(path.read_text())["kernels"] == attention_launches.kernels_digest()
    finally:
        attention_launches.tuned.cache_clear()
