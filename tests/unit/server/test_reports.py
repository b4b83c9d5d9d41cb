"""Reports of clients that train by themselves: counted once, held against the manifest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.server.reports import Reports, Trained
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import Manifest


def reports_of_two() -> Reports:
    reports = Reports()
    reports.begin(3, [Manifest("ada", 3, (4, 5), (1, 2)), Manifest("bo", 3, (6,), (2,))])
    return reports


def report(**changes: Any) -> pb.Trained:
    return pb.Trained(**{"window": 3, "loss_sum": 2.5, "masked_tokens": 3, "last": True, **changes})


def test_parts_add_up_and_the_last_one_counts_all_of_them() -> None:
    reports = reports_of_two()
    assert not reports.receive("ada", report(masked_tokens=1, last=False))
    assert reports.awaited == {"ada", "bo"}
    assert reports.receive("ada", report(loss_sum=1.0, masked_tokens=2))
    assert reports.awaited == {"bo"}
    assert reports.receive("bo", report(loss_sum=0.5, masked_tokens=2))
    assert not reports.awaited
    by_client = {"ada": (3.5, 3), "bo": (0.5, 2)}
    assert reports.take() == Trained(loss_sum=4.0, tokens=15, masked_tokens=5, losses=by_client)
    assert reports.take() == Trained(), "once"


def test_what_a_client_had_not_trained_to_the_end_is_lost_with_it() -> None:
    reports = reports_of_two()
    reports.receive("ada", report(masked_tokens=1, last=False))
    reports.drop("ada")
    reports.drop("ada")
    reports.receive("bo", report(masked_tokens=2))
    reports.drop("bo")
    assert reports.take() == Trained(2.5, 6, 2, {"bo": (2.5, 2)}, lost_masked_tokens=3)


def test_with_a_body_none_is_awaited() -> None:
    assert not Reports().awaited and Reports().take() == Trained()
    with pytest.raises(WireError, match="client ada: report of window 3, which was not asked for"):
        Reports().receive("ada", report())


@pytest.mark.parametrize(
    ("client", "changes", "message"),
    [
        ("cy", {}, "client cy: report of window 3, which was not asked for"),
        ("ada", {"window": 2}, "client ada: report of window 2, which was not asked for"),
        ("ada", {"loss_sum": math.nan}, "a loss of nan"),
        ("ada", {"loss_sum": math.inf}, "a loss of inf"),
        ("ada", {"loss_sum": -1.0}, "a loss of -1 for"),
        ("ada", {"masked_tokens": 4, "last": False}, "4 masked tokens instead of 3"),
        ("ada", {"masked_tokens": 2}, "2 masked tokens instead of 3"),
    ],
)
def test_a_report_that_does_not_fit_is_refused_and_leaves_no_trace(client: str, changes: Any, message: str) -> None:
    reports = reports_of_two()
    with pytest.raises(WireError, match=message):
        reports.receive(client, report(**changes))
    assert reports.receive("ada", report())
    assert reports.take() == Trained(loss_sum=2.5, tokens=9, masked_tokens=3, losses={"ada": (2.5, 3)})


def test_a_second_report_after_the_last_is_refused() -> None:
    reports = reports_of_two()
    reports.receive("ada", report())
    with pytest.raises(WireError, match="not asked for"):
        reports.receive("ada", report())
