"""Runs side by side: a process for each run, a device for each process, one error ends them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fedbert_ds.errors import ConfigError, RunError, UserError
from fedbert_ds.glue.run import Progress, Run, fine_tune_run

Arguments = Mapping[str, Any]
"""Of `fine_tune_run`, without device and report."""


def devices_at_hand(device: str | None, workers: int | None) -> list[str]:
    """The device of each worker: every GPU once, or a CPU worker; `workers` changes the number.

    ConfigError for a device that is not there and for fewer than one worker.
    """
    import torch

    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: must be 1 or more")
    gpus = torch.cuda.device_count()
    if device not in (None, "cpu", "cuda", *(f"cuda:{number}" for number in range(gpus))) or (
        device == "cuda" and not gpus
    ):
        raise ConfigError(f"--device {device}: no such device; there are {gpus} GPUs (cuda, cuda:N) and cpu")
    if device in (None, "cuda") and gpus:
        devices = [f"cuda:{number}" for number in range(gpus)]
    else:
        devices = [device or "cpu"]
    return [devices[number % len(devices)] for number in range(workers or len(devices))]


def run_all(jobs: Sequence[Arguments], devices: Sequence[str], report: Callable[[Progress], None]) -> None:
    """Fine-tune all jobs, as many at once as there are devices; with one device in this process.

    Raises the first UserError of a run, and RunError when a process dies; other processes are
    ended.
    """
    if len(devices) == 1:
        for job in jobs:
            fine_tune_run(**job, device=devices[0], report=report)
        return
    waiting, free = list(jobs), list(devices)
    running: dict[Connection, tuple[Run, str, Any]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, device = waiting.pop(0), free.pop(0)
                receiver, process = _start(job, device, len(devices))
                running[receiver] = (job["run"], device, process)
            for receiver in _readable(running):
                run, device, process = running[receiver]
                try:
                    message = receiver.recv()
                except EOFError:  # without a last word
                    process.join()
                    raise RunError(
                        f"{run.name}: its process ended with code {process.exitcode}; "
                        "start again, finished runs are kept"
                    ) from None
                if isinstance(message, UserError):
                    raise message
                if isinstance(message, Progress):
                    report(message)
                else:
                    process.join()
                    del running[receiver]
                    free.append(device)
    finally:
        for _, _, process in running.values():
            process.terminate()
            process.join()


def _readable(running: Mapping[Connection, Any]) -> list[Connection]:
    ready = wait(list(running))
    return [receiver for receiver in running if receiver in ready]


def _start(job: Arguments, device: str, workers: int) -> tuple[Connection, Any]:
    # CUDA cannot be used in a forked process.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, device, workers, sender), daemon=True)
    process.start()
    # The process holds the other end: when it dies, reading ends too.
    sender.close()
    return receiver, process


def _work(job: Arguments, device: str, workers: int, sender: Connection) -> None:
    """A process: progress, then None when the run is done, or the error that the user can mend."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    try:
        fine_tune_run(**job, device=device, report=sender.send)
        sender.send(None)
    except UserError as error:
        sender.send(error)
