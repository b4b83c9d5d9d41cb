"""The report: a picture, and a page that stands alone and shows text as text."""

import math
from dataclasses import replace
from html.parser import HTMLParser

from fedbert_ds.telemetry.metrics import WindowMetrics
from fedbert_ds.telemetry.report import smoothed, write_report

ROW = WindowMetrics(
    window=0,
    loss=6.0,
    tokens=8192,
    masked_tokens=1228,
    lost_masked_tokens=0,
    seconds=0.5,
    busy_seconds=0.35,
    wait_seconds=0.1,
    forwards=4,
    backwards=4,
    dummy_micro_batches=0,
    fill=0.95,
    bytes_up=4_000_000,
    bytes_down=4_000_000,
    update_bytes_up=500_000,
    update_bytes_down=500_000,
    clients=4,
    learning_rate=1e-4,
)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, captions and sources."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def rows(count):
    return [
        replace(ROW, window=window, loss=9.0 - 0.01 * window + 0.2 * math.sin(7.0 * window)) for window in range(count)
    ]


def read(page):
    parser = Page()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def test_page_stands_alone_and_holds_the_figures(tmp_path):
    facts = {"model": "BERT 2 x 128", "held-out loss": "5.06"}
    page = write_report(tmp_path / "default", "run:\n  windows: 200\n", rows(200), facts, {"word frequency alone": 8.1})
    assert (tmp_path / "default" / "loss.png").read_bytes().startswith(b"\x89PNG")
    parsed = read(page)
    assert len(parsed.sources) == 1
    assert parsed.sources[0].startswith("data:image/png;base64,")
    for text in ("default", "model", "BERT 2 x 128", "5.06", "1,638,400", "16.4k", "70.0 %", "20.0 %", "1.1 kB"):
        assert text in parsed.text
    assert "run:\n  windows: 200" in parsed.text


def test_text_is_shown_as_text(tmp_path):
    hostile = "<script>alert('x')</script> & \"{style}\""
    page = write_report(tmp_path / "a<b", hostile, rows(3), {hostile: hostile})
    assert "<script" not in page.read_text(encoding="utf-8")
    parsed = read(page)
    assert parsed.text.count(hostile) == 3


def test_short_runs_have_a_report_too(tmp_path):
    for count in (0, 1, 2):
        read(write_report(tmp_path / str(count), "", rows(count), {}))
        assert (tmp_path / str(count) / "loss.png").is_file()


def test_smoothing_is_a_mean_by_masked_tokens_around_each_window():
    windows = [replace(ROW, loss=float(index), masked_tokens=1 + index % 2) for index in range(40)]
    means = smoothed(windows)
    assert len(means) == 40
    assert means[1] == (0.0 * 1 + 1.0 * 2 + 2.0 * 1) / 4
    assert means[0] == (0.0 * 1 + 1.0 * 2) / 3


def test_smoothing_passes_over_losses_that_are_no_number():
    means = smoothed([ROW, replace(ROW, loss=math.nan), replace(ROW, masked_tokens=0)])
    assert means[0] == 6.0
    assert math.isnan(means[1])
    assert math.isnan(means[2])
