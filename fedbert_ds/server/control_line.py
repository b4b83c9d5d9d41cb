"""A rank's conversation with an aggregator of another party: orders out, reports in."""

from __future__ import annotations

import queue
import threading

import grpc

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import AggregatorLost, WireError
from fedbert_ds.federation.agreement import agreement
from fedbert_ds.server.addresses import tls_of
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire import introduction
from fedbert_ds.wire.aggregation import rank_name, read_secret
from fedbert_ds.wire.channel import TlsFiles, await_ready, connect
from fedbert_ds.wire.http_proxy import proxy_note
from fedbert_ds.wire.messages import PROTOCOL
from fedbert_ds.wire.stream import ControlStream

OPEN_SECONDS = 300.0
"""Longest wait for the answer to Open: the aggregator builds its model meanwhile."""


def open_run(
    config: RunConfig, ranks: int, vocabulary: int, pad_token: int, shape_hash: str, resume: bool
) -> pb.Opened:
    """Name the run to the aggregator; rank 0 calls it. Waits `clients.join_timeout` s to reach it.

    Raises WireError with the aggregator's reason if it refuses, or if nobody answers.
    """
    assert config.aggregator is not None
    address = config.aggregator.address
    request = pb.OpenRun(
        protocol=PROTOCOL,
        secret=read_secret(config.aggregator.secret),
        ranks=ranks,
        agreement=agreement(config),
        shape_hash=shape_hash,
        vocabulary=vocabulary,
        pad_token=pad_token,
        resume=resume,
    )
    tls = tls_of(config.server.tls)
    with connect(address, tls) as channel:
        try:
            await_ready(channel, address, tls, config.clients.join_timeout)
            opened: pb.Opened = introduction.open_run(channel, request, OPEN_SECONDS).result()
        except grpc.FutureTimeoutError:
            raise WireError(
                f"{address}: no aggregator answers; check aggregator.address, that it runs, and TLS on both sides"
                f"{proxy_note(address)}"
            ) from None
        except grpc.RpcError as error:
            details = error.details() or "no details"
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise WireError(f"the aggregator refused this run: {details}") from error
            raise WireError(
                f"{address}: no aggregator ({error.code().name.lower()}: {details}); check aggregator.address"
            ) from error
    if len(opened.sessions) != ranks:
        raise WireError(f"{address}: {len(opened.sessions)} sessions for {ranks} ranks; that is no aggregator")
    return opened


class ControlLine:
    """Orders and reports of one rank, from `start` to `stop`. A lost connection is dialled again
    for `reconnect_timeout` seconds.
    """

    def __init__(self, address: str, tls: TlsFiles | None, rank: int, session: str, reconnect_timeout: float) -> None:
        self._address = address
        self._stream = ControlStream(address, tls, rank_name(rank), session, reconnect_timeout, shares_memory=False)
        self._reports: queue.SimpleQueue[pb.Report | WireError] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reports of the aggregator", daemon=True)

    def start(self) -> None:
        """Dial."""
        self._stream.__enter__()
        self._thread.start()

    def stop(self) -> None:
        """Hang up after what was sent. Further calls do nothing."""
        if self._thread.is_alive():
            self._stream.__exit__()
            self._thread.join(timeout=10)

    def send(self, order: pb.Order) -> None:
        """Queue an order."""
        self._stream.send(order)

    def take(self, timeout: float = 0.0) -> pb.Report | None:
        """The oldest report, waiting up to `timeout` s. Raises AggregatorLost when no more come."""
        try:
            report = self._reports.get(timeout=timeout) if timeout > 0 else self._reports.get_nowait()
        except queue.Empty:
            return None
        if isinstance(report, pb.Report) and not report.HasField("failed"):
            return report
        self._reports.put(report)  # for the next call
        reason = report.failed.reason if isinstance(report, pb.Report) else str(report)
        raise AggregatorLost(f"the aggregator at {self._address} is lost: {reason}")

    def _run(self) -> None:
        try:
            while True:
                self._reports.put(self._stream.receive())
        except WireError as error:
            self._reports.put(error)
