"""Whether LayerNorm and GELU are ours or torch.compile's on a card: ours where they were measured faster, only there.

The bytes that both must move are the same for everybody, so a compiler may well be as good; it depends on the card, the
width and the releases. So both are timed there once, before a run starts, and the outcome is kept in a file
under ~/.cache (or $XDG_CACHE_HOME). `fedbert-ds bench kernels --tune` measures again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from fedbert_kernels import compiled_rows, gelu, layer_norm, row_philox
from fedbert_kernels.attention_launches import capability, card_index
from fedbert_kernels.compiled_rows import compiled_bias_gelu, compiled_residual_layer_norm
from fedbert_kernels.gelu import bias_gelu
from fedbert_kernels.interpreter import triton
from fedbert_kernels.launch import GAIN, digest, table_path, write_json
from fedbert_kernels.layer_norm import residual_layer_norm

LAYER_NORM, GELU = "layer norm", "GELU"
BYTES = 256 << 20
"""Of each tensor: no cache holds it, and it keeps the card busy for longer than a host takes to launch the kernels."""
LONGEST_WAIT = 300.0
"""Seconds for another process to measure: one that hangs, or locks of a file system that do, must not stop the rest."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowCase:
    """What is measured as one."""

    kernel: str
    """LAYER_NORM or GELU."""
    dtype: torch.dtype
    width: int
    dropout: float = 0.0
    """Drop probability in training; any but 0 costs the same."""

    @property
    def name(self) -> str:
        """What measurements are kept by."""
        dropout = " dropout" if self.dropout else ""
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} {self.width}{dropout}"


Times = tuple[float, float]
"""Milliseconds of (ours, torch.compile's), forward and backward; infinite for one that does not run."""


def operator(kernel: str, ours: bool) -> Callable[..., Tensor]:
    """What computes LAYER_NORM or GELU: our kernel, or torch.compile's."""
    if kernel == GELU:
        return bias_gelu if ours else compiled_bias_gelu
    return residual_layer_norm if ours else compiled_residual_layer_norm


def kept(cases: Iterable[RowCase], device: torch.device) -> dict[str, bool]:
    """{name of a case: whether our kernel is faster than torch.compile on this card}, measured now if nobody has yet.

    Processes of a machine measure one at a time, and the later ones read what the first wrote: all must compute the
    same. Off a GPU nothing is measured and the answer is yes.
    """
    wanted = {case.name: case for case in cases}
    if device.type != "cuda":
        return dict.fromkeys(wanted, True)
    index = card_index(device)
    known = _read(choices_path(index))
    if not wanted.keys() <= known.keys():
        with _alone(choices_path(index)):
            known = _read(choices_path(index))
            missing = {name: case for name, case in wanted.items() if name not in known}
            known |= keep({name: measure(case, index) for name, case in missing.items()}, index)
    return {name: known[name] for name in wanted}


def measure_again(cases: Iterable[RowCase], device: torch.device) -> dict[str, Times]:
    """{name of a case: milliseconds}, whatever was measured before; later runs on this card go by these."""
    index = card_index(device)
    with _alone(choices_path(index)):
        times = {case.name: measure(case, index) for case in cases}
        keep(times, index)
    return times


def keep(times: Mapping[str, Times], index: int) -> dict[str, bool]:
    """Write down, for the card with this index, whose kernel runs from now on; {name: whether ours}.

    Ours must be clearly faster, at most `GAIN` of the time: what is as good without being ours is better. One that did
    not run is not written down, as it may run tomorrow.
    """
    ours = {name: is_ours_faster(pair) for name, pair in times.items()}
    path = choices_path(index)
    table = _read(path) | {name: answer for name, answer in ours.items() if math.inf not in times[name]}
    try:
        write_json(path, {"kernels": _digest(), "kept": dict(sorted(table.items()))})
    except OSError as error:
        logger.warning("%s cannot be written (%s): every start will measure LayerNorm and GELU anew", path, error)
    return ours


def is_ours_faster(times: Times) -> bool:
    """Clearly, and it runs."""
    ours, compiled = times
    return ours < math.inf and ours <= GAIN * compiled


def choices_path(index: int) -> Path:
    """Where the choices for a card lie, or would lie; another release of torch may compile better."""
    table = table_path(torch.cuda.get_device_name(index), capability(index), triton.__version__)
    return table.with_name(f"{table.stem}-torch-{torch.__version__.split('+')[0]}-rows.json")


def measure(case: RowCase, index: int) -> Times:
    """Time both on the card with this index; torch's random numbers go on as if nothing had been drawn."""
    # A log's default level shows it: half a minute of silence before a run starts would look like a hang.
    logger.warning("measuring %s beside torch.compile's, once for this card and these releases", case.name)
    with torch.cuda.device(index), torch.random.fork_rng(devices=[index]):
        times = _milliseconds(case, ours=True), _milliseconds(case, ours=False)
        torch.cuda.empty_cache()
    return times


def _milliseconds(case: RowCase, ours: bool) -> float:
    """Of forward and backward; infinite if that does not run here."""
    from triton.testing import do_bench

    try:
        milliseconds: float = do_bench(training_step(case, ours, "cuda"), return_mode="median")
    except Exception as error:  # Compilers and drivers fail in many ways, and none of them makes this one usable.
        name, reason = "our kernel" if ours else "torch.compile's", str(error).strip().partition("\n")[0]
        logger.warning("%s: %s does not run here: %s", case.name, name, reason)
        return math.inf
    return milliseconds


def training_step(case: RowCase, ours: bool, device: str, num_bytes: int = BYTES) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward and backward over tensors of `num_bytes`; returns the gradients of all inputs."""
    compute = operator(case.kernel, ours)
    num_rows = num_bytes // (case.width * case.dtype.itemsize)
    num_large, num_parameters, numbers = (2, 3, (case.dropout, 1e-12)) if case.kernel == LAYER_NORM else (1, 1, ())
    sizes = [(num_rows, case.width)] * num_large + [(case.width,)] * num_parameters
    inputs = [torch.randn(size, device=device, dtype=case.dtype, requires_grad=True) for size in sizes]
    dy = torch.randn(num_rows, case.width, device=device, dtype=case.dtype)
    return lambda: torch.autograd.grad(compute(*inputs, *numbers), inputs, dy)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps the machine's other processes out; each is on its own where no lock can be had."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock"), timeout=LONGEST_WAIT))
        yield


def _read(path: Path) -> dict[str, bool]:
    """Empty where nobody has measured, or other kernels were measured."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["kernels"] != _digest():
            return {}
        return {str(name): answer is True for name, answer in table["kept"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _digest() -> str:
    return digest(gelu.__file__, layer_norm.__file__, row_philox.__file__, compiled_rows.__file__)
