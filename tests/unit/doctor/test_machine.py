"""Folders, disk, memory, descriptors and GPUs."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from fedbert_ds.doctor.machine import (
    descriptor_finding,
    disk_finding,
    folder_finding,
    gpu_finding,
    memory_finding,
    nvidia_driver,
)

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("name", [".", "new", "new/below/it"])
def test_a_folder_that_can_be_written_or_made_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    assert folder_finding("state folder", tmp_path / name, "--state").level == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "notes.txt/below"])
def test_a_file_in_the_way_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    finding = folder_finding("run folder", tmp_path / name, "run.directory")
    assert finding.is_in_the_way and "cannot be written" in finding.says and "run.directory" in finding.remedy
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    finding = folder_finding("run folder", tmp_path / "new", "run.directory")
    assert finding.is_in_the_way and f"{tmp_path} cannot be written (Permission denied)" in finding.says


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda where: Usage(10e9, 7e9, 3e9))
    assert disk_finding(tmp_path / "not" / "there", 2.9e9, "checkpoints").level == "ok"
    full = disk_finding(tmp_path / "not" / "there", 3.1e9, "checkpoints")
    assert full.is_in_the_way and f"3.0 GB free at {tmp_path}, checkpoints take 3.1 GB" in full.says


def test_memory() -> None:
    assert memory_finding("memory", 1e9, 2e9, "the model", "take less").level == "ok"
    assert memory_finding("memory", 3e9, 2e9, "the model", "take less").is_in_the_way


def test_descriptors_are_for_two_connections_of_each_client() -> None:
    assert descriptor_finding(1024, 512, 256).level == "ok"
    assert descriptor_finding(1024, 512, 257).is_in_the_way


@pytest.mark.parametrize(
    ("driver", "cuda", "names", "precision", "level", "says"),
    [
        ("550.1", "12.4", ["H100", "H100"], "bf16", "ok", "2 x H100, driver 550.1, torch for CUDA 12.4"),
        ("550.1", None, [], "bf16", "fail", "this torch is for CPUs"),
        ("470.2", "12.8", [], "bf16", "fail", "torch for CUDA 12.8 cannot use NVIDIA's driver 470.2"),
        (None, None, [], "bf16", "warn", "bf16 is slow"),
        (None, "12.4", [], "fp32", "ok", "computes on the CPU"),
    ],
)
def test_gpus(driver: str | None, cuda: str | None, names: list[str], precision: str, level: str, says: str) -> None:
    finding = gpu_finding(driver, cuda, names, precision)
    assert finding.level == level and says in finding.line


def test_the_driver_is_nvidia_s_own_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_driver() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    program.chmod(0o755)
    assert nvidia_driver() == "550.54.15"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert nvidia_driver() is None, "a driver that does not answer is none"
