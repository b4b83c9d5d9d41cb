"""Many client streams at one endpoint for a long time: is memory flat, is anything lost?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from fedbert_ds.bench.network.endpoint import ClientProcess, Load, MeasuredEndpoint

Row = dict[str, Any]
PROCESSES = 4
MESSAGE_BYTES = 16 << 10
ANSWERS_PER_SECOND = 200
"""Of all streams together: light enough for any machine to keep up."""
SAMPLE_SECONDS = 5.0


def stream_rows(streams: int, seconds: float) -> Iterator[Row]:
    """A row every few seconds: the endpoint's memory, messages so far, and how many were wrong.

    The last row, `is_over`, also says what the clients sent and how many answers came to them.
    """
    names = tuple(f"client-{number:04d}" for number in range(streams))
    with ExitStack() as stack:
        endpoint = stack.enter_context(MeasuredEndpoint(names, answer_bytes=MESSAGE_BYTES))
        processes = [stack.enter_context(ClientProcess()) for _ in range(min(PROCESSES, streams))]
        started = time.monotonic()
        for number, process in enumerate(processes):
            load = Load(
                address=endpoint.address,
                clients=names[number :: len(processes)],
                message_bytes=MESSAGE_BYTES,
                seconds=seconds,
                pause=streams / ANSWERS_PER_SECOND,
            )
            process.run(load)
        while (now := time.monotonic() - started) < seconds:
            yield _row(streams, now, endpoint)
            time.sleep(min(SAMPLE_SECONDS, max(0.1, seconds - now)))
        results = [process.result() for process in processes]
        yield _row(streams, time.monotonic() - started, endpoint) | {
            "is_over": True,
            "answers": sum(result.messages for result in results),
            "wrong_answers": sum(result.wrong for result in results),
            "client_rss_mb": [round(result.rss_bytes / 1e6, 1) for result in results],
        }


def _row(streams: int, seconds: float, endpoint: MeasuredEndpoint) -> Row:
    usage = endpoint.usage()
    return {
        "what": "streams",
        "streams": streams,
        "seconds": round(seconds, 1),
        "is_over": False,
        "rss_mb": round(usage.rss_bytes / 1e6, 1),
        "cpu_seconds": round(usage.cpu_seconds, 1),
        "messages": usage.messages,
        "wrong": usage.wrong,
        "left": usage.lost_clients,
    }


def describe(row: Row) -> str:
    """One line of a row, a minute; nothing for the rows between."""
    if row["seconds"] % 60 >= SAMPLE_SECONDS and not row["is_over"]:
        return ""
    line = (
        f"{row['seconds']:>6.0f} s  {row['streams']} streams  {row['messages']:>8,} messages, {row['wrong']} lost or "
        f"doubled  endpoint {row['rss_mb']:.0f} MB"
    )
    if row["is_over"]:
        line += f"; {row['answers']:,} answers, {row['wrong_answers']} lost or doubled"
    return line
