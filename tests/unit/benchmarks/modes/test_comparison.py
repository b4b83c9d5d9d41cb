"""Rows, final figures, table and picture of runs whose numbers are known."""

from dataclasses import replace

import pytest

from benchmarks.modes.comparison import Run, check_same_batches, draw, final, rows, table
from fedbert_ds.compare.runs import ClientCosts
from fedbert_ds.compare.systems import System
from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.metrics import WindowMetrics

METRICS = WindowMetrics(
    window=0,
    loss=6.0,
    tokens=1000,
    masked_tokens=150,
    lost_masked_tokens=0,
    seconds=2.0,
    busy_seconds=1.0,
    wait_seconds=0.5,
    forwards=4,
    backwards=4,
    dummy_micro_batches=0,
    fill=0.5,
    bytes_up=1000,
    bytes_down=500,
    update_bytes_up=300,
    update_bytes_down=200,
    clients=4,
    learning_rate=1e-4,
)


def run(system, above=0.0, windows=40):
    metrics = [replace(METRICS, window=number, loss=8.0 - number / 20 + above) for number in range(windows)]
    return Run(
        system,
        metrics,
        held_out_loss=6.2 + above,
        unigram_loss=6.7,
        seconds=90.0,
        commit="abc",
        weight_difference=above,
    )


RUNS = (run(System("centralized")), run(System("synchronous"), 1e-6), run(System("parallel", 5), 0.25))


def test_names():
    assert [one.system.label for one in RUNS] == ["centralized", "synchronous", "parallel, average every 5"]
    assert [one.system.slug for one in RUNS] == ["centralized", "synchronous", "parallel-5"]


def test_rows_count_tokens_up_to_and_with_the_window():
    everything = rows(RUNS)
    assert len(everything) == 120
    assert everything[0] == {
        "system": "centralized", "average_every": None, "staleness": 0, "window": 0, "tokens": 1000, "loss": 8.0,
    }  # fmt: skip
    assert everything[-1] == everything[0] | {
        "system": "parallel", "average_every": 5, "window": 39, "tokens": 40_000, "loss": 6.3,
    }  # fmt: skip


def test_final_figures_are_differences_to_the_baseline():
    centralized, synchronous, parallel = final(RUNS, "centralized")
    assert centralized["held_out_difference"] == centralized["largest_difference"] == 0
    assert synchronous["largest_difference"] == pytest.approx(1e-6)
    assert parallel["held_out_difference"] == pytest.approx(0.25)
    assert parallel["training_loss"] == pytest.approx((6.05 + 6.1) / 2 + 0.25)
    assert parallel["bytes_per_token"] == pytest.approx(2.0)
    assert parallel["bytes_per_token_averaging"] == pytest.approx(0.5)
    assert (parallel["windows"], parallel["tokens"], parallel["seconds_in_windows"]) == (40, 40_000, 80.0)


def test_table_reads_from_the_final_rows_alone():
    lines = table(final(RUNS, "centralized"), "centralized").splitlines()
    assert lines[2:] == [
        "| word frequency alone |  | 6.700 |  |  |  |  |  |",
        "| centralized | 6.075 | 6.200 |  |  |  |  |  |",
        "| synchronous | 6.075 | 6.200 | 0.000 | 1.0e-06 | 1.0e-06 | 2 | 0 |",
        "| parallel, average every 5 | 6.325 | 6.450 | +0.250 | 0.25 | 0.25 | 2 | 0 |",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_costs_of_clients_get_columns_where_they_are_known():
    known = replace(RUNS[1], client=ClientCosts(flops_per_token=2_130_000.0, peak_memory_mb=688))
    heads, _, words, baseline, ours, others = table(
        final([RUNS[0], known, RUNS[2]], "centralized"), "centralized"
    ).splitlines()[:6]
    assert heads.endswith("| client FLOP per token | client peak memory |")
    assert ours.endswith("| 2.13 M | 688 MB |") and others.endswith("|  |  |")
    assert len({line.count("|") for line in (heads, words, baseline, ours, others)}) == 1


def test_learning_rates_get_a_column_where_they_differ():
    faster = replace(RUNS[1], windows=[replace(row, learning_rate=3e-4) for row in RUNS[1].windows])
    lines = table(final([RUNS[0], faster, RUNS[2]], "centralized"), "centralized").splitlines()
    assert lines[0].startswith("| system | learning rate | training loss, end | held-out loss |")
    assert lines[2].startswith("| word frequency alone |  |  | 6.700 |")
    assert lines[3].startswith("| centralized | 1.0e-04 | 6.075 | 6.200 |")
    assert lines[4].startswith("| synchronous | 3.0e-04 | 6.075 | 6.200 | 0.000 |")
    assert len({line.count("|") for line in lines}) == 1


def in_turns():
    """Windows of other text: twice the tokens in every other one, none in the rest."""
    metrics = run(System("sequential", 10)).windows
    uneven = [replace(row, tokens=2000 * (row.window % 2), masked_tokens=300 * (row.window % 2)) for row in metrics]
    return replace(run(System("sequential", 10), 0.5), windows=uneven)


def test_where_clients_take_turns_windows_are_not_compared():
    check_same_batches([*RUNS, in_turns()])
    row = final([*RUNS, in_turns()], "centralized")[-1]
    assert row["largest_difference"] is None and row["held_out_difference"] == pytest.approx(0.5)
    assert "| sequential, average every 10 |" in (line := table([*final(RUNS, "centralized"), row], "centralized"))
    assert line.splitlines()[-1].split(" | ")[4] == ""
    shorter = replace(in_turns(), windows=in_turns().windows[:-1])
    other_text = replace(in_turns(), unigram_loss=6.8)
    for odd, complaint in ((shorter, "39 windows"), (other_text, "held-out text")):
        with pytest.raises(RunError, match=complaint):
            check_same_batches([RUNS[0], odd])


@pytest.mark.parametrize("runs", [RUNS, (*RUNS, in_turns())], ids=["same windows", "turns"])
def test_picture(tmp_path, runs):
    path = tmp_path / "results" / "picture.png"
    draw(path, runs, "centralized")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_batches_are_not_compared():
    check_same_batches(RUNS)
    shorter = run(System("synchronous"), windows=39)
    other_window = replace(RUNS[1], windows=[*RUNS[1].windows[:-1], replace(RUNS[1].windows[-1], masked_tokens=149)])
    other_text = replace(RUNS[1], unigram_loss=6.8)
    for odd, complaint in ((shorter, "39 windows"), (other_window, "149 of them"), (other_text, "held-out text")):
        with pytest.raises(RunError, match=complaint):
            check_same_batches([RUNS[0], odd])
