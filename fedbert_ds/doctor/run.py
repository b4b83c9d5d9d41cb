"""What would stop a run at its server, in the order in which a start would meet it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

from fedbert_ds.config import RunConfig
from fedbert_ds.doctor.certificates import certificate_findings
from fedbert_ds.doctor.finding import Finding, fault, of_error, ok, tried
from fedbert_ds.doctor.machine import (
    descriptor_finding,
    disk_finding,
    folder_finding,
    gpu_finding,
    memory_finding,
    nvidia_driver,
)
from fedbert_ds.doctor.network import name_finding, port_finding, proxy_finding
from fedbert_ds.doctor.text import sampled, tokenizer_finding, unknown_findings
from fedbert_ds.doctor.versions import version_findings
from fedbert_ds.errors import UserError
from fedbert_ds.server.addresses import advertised_host, check_plaintext, listening_port, local_host, tls_of
from fedbert_ds.server.before_start import check_device
from fedbert_ds.server.body.settings import deepspeed_settings
from fedbert_ds.server.network.limits import MOST_DESCRIPTORS, most_connections
from fedbert_ds.server.run_folder import RunFolder, check_folder
from fedbert_ds.telemetry.trackers import check_trackers

KEPT_CHECKPOINTS = 3
"""Two that stay, and the one that is being written."""
STATES = 16
"""Bytes that training keeps of a parameter: weight, gradient and two moments, fp32."""


def examine_run(config: RunConfig, ranks: int | None = None) -> Iterator[Finding]:
    """Findings about a run on this machine with so many ranks; None: one a GPU, or one."""
    yield from version_findings("server")
    yield from _settings(config)
    yield from _folder(config)
    yield from _addresses(config, ranks or _gpus() or 1)
    yield from _certificates(config)
    yield clock_finding()
    yield from _device(config)
    yield from _model(config, ranks or _gpus() or 1)
    yield from _text(config)


def clock_finding() -> Finding:
    """What this machine takes for the time: nothing here tells whether it is right."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return ok("clock", f"{now} here; whether that is right cannot be told without another machine")


def _settings(config: RunConfig) -> Iterator[Finding]:
    if config.cut != "whole":
        settings = lambda: deepspeed_settings(config.body, config.optimizer)  # noqa: E731
        says = f"settings fit: {config.body.deepspeed or 'no file, zero_stage alone'}"
        yield tried("DeepSpeed", settings, says, "mend the file that body.deepspeed names")
    yield tried("encryption", lambda: check_plaintext(config), "TLS" if config.server.tls else "none needed, or wanted")
    if config.run.trackers:
        names = config.run.trackers
        yield tried("trackers", lambda: check_trackers(names), ", ".join(names), "name others in run.trackers")


def _folder(config: RunConfig) -> Iterator[Finding]:
    folder = RunFolder(config.run.directory)
    writable = folder_finding("run folder", folder.path, "run.directory")
    yield writable
    if writable.is_in_the_way:
        return
    goes_on = folder.config.is_file()
    says = "holds a run: --resume goes on with it" if goes_on else "is free"
    yield tried("run folder", lambda: check_folder(folder, config, resume=goes_on), f"{folder.path} {says}")


def _addresses(config: RunConfig, ranks: int) -> Iterator[Finding]:
    for rank in range(ranks if config.server.port else 1):
        yield port_finding(config.server.host, listening_port(config.server, rank))
    has_others = config.clients.expected > config.clients.local
    if has_others:
        yield name_finding(advertised_host(config.server, ranks), "server.advertise", for_others=True)
    if config.aggregator is not None:
        yield name_finding(config.aggregator.address.rpartition(":")[0].strip("[]"), "aggregator.address", False)
    yield proxy_finding(config.aggregator.address if config.aggregator else None)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    yield descriptor_finding(allowed, most_connections(allowed), config.clients.most)


def _certificates(config: RunConfig) -> Iterator[Finding]:
    section, tls = config.server.tls, tls_of(config.server.tls)
    if section is None or tls is None:
        return
    hosts = [advertised_host(config.server, 1)] if config.clients.expected > config.clients.local else []
    hosts += [local_host(config.server)] if config.clients.local else []
    yield from certificate_findings(tls, hosts, section.revoked)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device(config: RunConfig) -> Iterator[Finding]:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(_gpus())]
    yield gpu_finding(nvidia_driver(), torch.version.cuda, names, config.body.precision)
    yield tried("device", lambda: check_device(config), "kernels, compiler and precision fit it")


def _model(config: RunConfig, ranks: int) -> Iterator[Finding]:
    """The model, and what it takes of disk and memory."""
    import torch

    from fedbert_ds.model.cut import body_outline, client_outline
    from fedbert_ds.planner.derive import model_config_of
    from fedbert_ds.server.checkpoint import BYTES_PER_PARAMETER

    try:
        model = model_config_of(config)
        half = client_outline(model, config.cut).num_parameters
        body = 0 if config.cut == "whole" else body_outline(model, config.cut).num_parameters
    except UserError as error:
        yield of_error("model", error, "name another in model.checkpoint")
        return
    name = config.model.checkpoint or config.model.architecture
    yield ok("model", f"{name}: body {body:,} parameters, client half {half:,}")
    needed = KEPT_CHECKPOINTS * BYTES_PER_PARAMETER * (body + half)
    yield disk_finding(config.run.directory, needed, "checkpoints")
    body, half = STATES * body, STATES * half
    local = config.clients.local * half
    if _gpus():
        least = min(torch.cuda.get_device_properties(number).total_memory for number in range(_gpus()))
        yield memory_finding("GPU memory", body / ranks, least, "a rank's body", "take more GPUs, or a smaller model")
        yield memory_finding("memory", half + local, _available(), "the client model", "lower clients.local")
    else:
        what, remedy = "the model with its optimizer", "take fewer ranks or clients, or a smaller model"
        yield memory_finding("memory", body * ranks + half + local, _available(), what, remedy)


def _available() -> float:
    import psutil

    return float(psutil.virtual_memory().available)


def _text(config: RunConfig) -> Iterator[Finding]:
    """The tokenizer, and the text of local clients."""
    from fedbert_ds.data.corpus import Reading
    from fedbert_ds.data.text_files import Encodings

    name, tokenizer = config.tokenizer.path or config.model.checkpoint, None
    if name is not None:
        finding, tokenizer = tokenizer_finding(name)
        yield finding
    elif not config.clients.local:
        yield fault("tokenizer", "none is named, and the server has no text to train one", "name one in tokenizer.path")
    if not config.clients.local or config.task.is_labelled:
        return
    reading = Reading(config.data.text_column, Encodings(config.data.encoding))
    findings, articles = sampled(config.data.source, reading)
    yield from findings
    if articles and tokenizer is not None:
        yield from unknown_findings(articles, tokenizer)
