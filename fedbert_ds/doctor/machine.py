"""What a machine must have: folders that can be written, disk, memory, descriptors, GPUs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedbert_ds.doctor.finding import Finding, fault, ok, warning


def folder_finding(about: str, folder: Path, key: str) -> Finding:
    """Whether a folder can be written, or made; `key` names another. Leaves nothing behind."""
    there = folder.absolute()
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            return ok(about, f"{folder} can be written")
    except OSError as error:
        return fault(
            about, f"{folder}: {there} cannot be written ({error.strerror or error})", f"name another in {key}"
        )


def disk_finding(folder: Path, needed: float, what: str) -> Finding:
    """Whether there is room for `needed` bytes at a folder, which need not be there yet."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    says = f"{free / 1e9:,.1f} GB free at {there}, {what} take{'s' * (not what.endswith('s'))} {needed / 1e9:,.1f} GB"
    return ok("disk", says) if free >= needed else fault("disk", says, "free some space, or name another folder")


def memory_finding(about: str, needed: float, there: float, what: str, remedy: str) -> Finding:
    """Whether `there` bytes hold what needs `needed`."""
    says = f"{there / 1e9:,.1f} GB, and {what} needs {needed / 1e9:,.1f} GB at the least"
    return ok(about, says) if there >= needed else fault(about, says, remedy)


def descriptor_finding(allowed: int, connections: int, clients: int) -> Finding:
    """Whether a process that may have so many descriptors, and takes so many connections, has room
    for all clients; each has a second connection while it joins.
    """
    says = f"{allowed:,} files and connections a process, so {connections:,} connections; {clients:,} clients"
    if connections >= 2 * clients:
        return ok("descriptors", says)
    return fault("descriptors", f"{says} need {2 * clients:,}", "raise the limit: ulimit -n, or LimitNOFILE of a unit")


def gpu_finding(driver: str | None, cuda: str | None, names: Sequence[str], precision: str) -> Finding:
    """What GPUs the body has.

    `driver` is the version of NVIDIA's driver, `cuda` the version that torch is built for, `names`
    those of the GPUs that torch can use.
    """
    if names:
        return ok("GPU", f"{len(names)} x {names[0]}, driver {driver or 'unknown'}, torch for CUDA {cuda}")
    if driver is not None and cuda is None:
        return fault("GPU", f"NVIDIA's driver {driver} is here, and this torch is for CPUs", "install torch for CUDA")
    if driver is not None:
        return fault(
            "GPU",
            f"torch for CUDA {cuda} cannot use NVIDIA's driver {driver}",
            "update the driver, or install torch for an older CUDA; see that CUDA_VISIBLE_DEVICES is not empty",
        )
    if precision == "bf16":
        return warning(
            "GPU", "none here, and body.precision: bf16 is slow on a CPU", "set fp32, or look on the node with the GPUs"
        )
    return ok("GPU", "none here: the body computes on the CPU")


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().partition("\n")[0] or None
