"""Windows written, read back, cut off on resume and summed up."""

import json
import math
from dataclasses import replace

import pytest

from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.metrics import MetricsLog, WindowMetrics, read_metrics, summary

ROW = WindowMetrics(
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
    dummy_micro_batches=1,
    fill=0.5,
    bytes_up=4000,
    bytes_down=2000,
    update_bytes_up=600,
    update_bytes_down=400,
    clients=4,
    learning_rate=1e-4,
)


def rows(count):
    return [replace(ROW, window=window, loss=6.0 - window / 10) for window in range(count)]


def write(path, windows, first_window=0):
    with MetricsLog(path, first_window) as log:
        for row in windows:
            log.append(row)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, rows(3))
    assert read_metrics(path) == rows(3)


def test_a_line_is_readable_before_the_log_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(ROW)
        assert read_metrics(path) == [ROW]


def test_resuming_drops_the_windows_that_are_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, rows(5))
    again = replace(ROW, window=3, loss=1.0)
    write(path, [again], first_window=3)
    assert read_metrics(path) == [*rows(3), again]


def test_windows_that_are_undone_leave_the_log_and_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    again = replace(ROW, window=2, loss=1.0)
    with MetricsLog(path) as log:
        for row in rows(4):
            log.append(row)
        log.roll_back(2)
        assert read_metrics(path) == rows(2)
        log.append(again)
        log.roll_back(3)  # nothing to undo
        assert read_metrics(path) == [*rows(2), again]
        log.roll_back(0)
        log.append(ROW)
    assert read_metrics(path) == [ROW]


def test_a_new_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, rows(5))
    write(path, [ROW])
    assert read_metrics(path) == [ROW]


def test_a_line_cut_short_by_a_crash_is_left_out_and_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, rows(2))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"window": 2, "los')
    assert read_metrics(path) == rows(2)
    write(path, [replace(ROW, window=2)], first_window=2)
    assert [row.window for row in read_metrics(path)] == [0, 1, 2]


def test_a_run_of_a_version_that_did_not_count_recompiles_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, rows(2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("recompiles") == 0 for line in lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == rows(2)


@pytest.mark.parametrize("line", ["no json", "[]", '{"window": 1}', "3"])
def test_other_damage_names_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    write(path, rows(1))
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nowhere\.jsonl"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_a_loss_that_is_no_number_is_null_in_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [replace(ROW, loss=math.nan)])
    assert json.loads(path.read_text())["loss"] is None
    assert math.isnan(read_metrics(path)[0].loss)


def test_summary_weighs_each_window_by_what_it_held():
    other = replace(
        ROW, loss=3.0, tokens=3000, masked_tokens=450, lost_masked_tokens=200, seconds=6.0, fill=1.0, forwards=6
    )
    both = summary([ROW, other])
    assert both.windows == 2
    assert both.tokens == 4000
    assert both.loss == pytest.approx((6.0 * 150 + 3.0 * 450) / 600)
    assert both.tokens_per_second == pytest.approx(500)
    assert both.busy_share == pytest.approx(0.25)
    assert both.wait_share == pytest.approx(0.125)
    assert both.fill == pytest.approx(4000 / (2000 + 3000))
    assert both.dummy_share == pytest.approx(0.2)
    assert both.lost_share == pytest.approx(200 / 800)
    assert both.bytes_per_token_up == pytest.approx(2.0)
    assert both.bytes_per_token_down == pytest.approx(1.0)
    assert both.update_bytes_per_token == pytest.approx(0.5)
    assert both.bytes_per_token == pytest.approx(sum(row.wire_bytes for row in (ROW, other)) / 4000)


def test_summary_of_nothing_is_zeros():
    nothing = summary([])
    assert (nothing.windows, nothing.tokens_per_second, nothing.bytes_per_token) == (0, 0.0, 0.0)
    assert math.isnan(nothing.loss)


def test_summary_leaves_out_a_loss_that_is_no_number():
    assert summary([ROW, replace(ROW, loss=math.nan)]).loss == 6.0
