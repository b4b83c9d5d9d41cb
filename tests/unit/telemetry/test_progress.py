"""The progress line: what it says, how often a log file hears of it, what a terminal shows."""

import io
import subprocess
import sys
from dataclasses import replace

import pytest

from fedbert_ds.telemetry.metrics import WindowMetrics
from fedbert_ds.telemetry.progress import Progress, duration, short_bytes, short_number

ROW = WindowMetrics(
    window=0,
    loss=5.214,
    tokens=18_200,
    masked_tokens=2730,
    lost_masked_tokens=0,
    seconds=1.0,
    busy_seconds=0.71,
    wait_seconds=0.2,
    forwards=4,
    backwards=4,
    dummy_micro_batches=0,
    fill=0.9,
    bytes_up=10_000_000,
    bytes_down=9_000_000,
    update_bytes_up=500_000,
    update_bytes_down=500_000,
    clients=4,
    learning_rate=1e-4,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(progress, windows, row=ROW):
    for window in windows:
        progress.update(replace(row, window=window))


def test_a_log_file_gets_the_whole_line():
    stream = io.StringIO()
    run(Progress(600, 4, stream), [319])
    assert stream.getvalue() == (
        "window 320/600  loss 5.21  18.2k tokens/s  body busy 71 %  4/4 clients  1.1 kB/token  4:40 left\n"
    )


def test_what_the_body_reaches_is_told_beside_what_it_could():
    stream = io.StringIO()
    run(Progress(600, 4, stream, peak_flops=8e12), [319], replace(ROW, flops=2e12))
    assert "  body busy 71 %, 25 % of peak  " in stream.getvalue()


def test_without_a_body_nothing_is_said_of_one():
    stream = io.StringIO()
    run(Progress(600, 4, stream), [319], replace(ROW, forwards=0, backwards=0, busy_seconds=0.0))
    assert stream.getvalue() == "window 320/600  loss 5.21  18.2k tokens/s  4/4 clients  1.1 kB/token  4:40 left\n"


def test_a_log_file_hears_every_twentieth_of_the_run():
    stream = io.StringIO()
    with Progress(200, 4, stream, clock=lambda: 0.0) as progress:
        run(progress, range(200))
    windows = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert windows == [1, *range(10, 201, 10)]


def test_a_log_file_hears_of_a_slow_run_in_between():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(2000, 4, stream, clock=lambda: now[0])
    for window in range(10):
        now[0] += 20.0
        run(progress, [window])
    windows = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert windows == ["1/2000", "3/2000", "5/2000", "7/2000", "9/2000"]


def test_rates_follow_the_last_windows():
    stream = io.StringIO()
    progress = Progress(100, 4, stream, clock=lambda: 0.0)
    run(progress, range(50), replace(ROW, seconds=10.0))
    run(progress, range(50, 100))
    assert "18.2k tokens/s" in stream.getvalue().splitlines()[-1]
    assert "0:00 left" in stream.getvalue().splitlines()[-1]


def test_a_terminal_gets_one_line_redrawn(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "130")
    stream = Terminal()
    with Progress(20, 4, stream) as progress:
        run(progress, range(20))
        progress.note("window 12: client [b] left")
    shown = stream.getvalue()
    assert "window 20/20" in shown
    assert "4/4 clients" in shown
    assert "window 12: client [b] left" in shown
    assert shown.count("\n") == 2, "the note, and the last state"


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_the_line_fits_the_terminal_and_keeps_loss_and_time(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with Progress(600, 4, stream) as progress:
        run(progress, [319])
    last = stream.getvalue().replace("\x1b[?25h", "").rstrip("\n").split("\x1b[2K")[-1]
    assert "\n" not in last
    assert "loss 5.21" in last
    assert "4:40 left" in last
    assert ("1.1 kB/token" in last) == (columns >= 140)


def test_a_missing_client_is_shown_however_narrow_the_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    with Progress(600, 4, stream) as progress:
        run(progress, [319], replace(ROW, clients=3))
    assert "3/4 clients" in stream.getvalue()


def test_a_dumb_terminal_is_treated_as_a_log_file(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(600, 4, stream) as progress:
        run(progress, [0])
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.7, "1.00k"), (1234, "1.23k"), (18_200, "18.2k"), (780_000, "780k"), (1.5e6, "1.50M")],
)
def test_short_number(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(("value", "text"), [(512, "512 B"), (1100, "1.1 kB"), (3.4e6, "3.4 MB"), (2e9, "2.0 GB")])
def test_short_bytes(value, text):
    assert short_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (72, "1:12"), (3599.6, "1:00:00"), (11_100, "3:05:00"), (187_200, "2 d 4 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_importing_telemetry_is_cheap():
    program = (
        "import sys, fedbert_ds.telemetry.metrics, fedbert_ds.telemetry.progress, fedbert_ds.telemetry.report\n"
        "print(*sorted({'rich', 'matplotlib', 'torch', 'numpy'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == ""
