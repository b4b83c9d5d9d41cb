"""Chooses LayerNorm and GELU for a card: our kernels where measured faster than torch.compile's.

Both move the same bytes, so a compiler may be as good; the outcome depends on card, width and
releases. Both are therefore timed once on a card, before a run starts, and the choice is kept in a
file under ~/.cache (or $XDG_CACHE_HOME). `fedbert-ds bench kernels --tune` measures again.
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
ROWS = 8192
"""Of each tensor, as a micro-batch has them: 12 MB in bf16 at width 768. Larger ones would be
compared by memory alone, where a run also feels the cache and the host's launches."""
LONGEST_WAIT = 300.0
"""Seconds for another process to measure: one that hangs, or a stuck lock, must not stop a run."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowCase:
    """One measurement's kernel, dtype, width and dropout."""

    kernel: str
    """LAYER_NORM or GELU."""
    dtype: torch.dtype
    width: int
    dropout: float = 0.0
    """Drop probability in training; every one but 0 costs the same."""

    @property
    def name(self) -> str:
        """Key of its measurement."""
        dropout = " dropout" if self.dropout else ""
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} {self.width}{dropout}"


Times = tuple[float, float]
"""Milliseconds (ours, torch.compile's) of forward and backward; infinite if one does not run."""


def operator(kernel: str, ours: bool) -> Callable[..., Tensor]:
    """The function that computes LAYER_NORM or GELU: our kernel, or torch.compile's."""
    if kernel == GELU:
        return bias_gelu if ours else compiled_bias_gelu
    return residual_layer_norm if ours else compiled_residual_layer_norm


def kept(cases: Iterable[RowCase], device: torch.device) -> dict[str, bool]:
    """{name of a case: whether our kernel runs on this card}, measured now if not yet known.

    A machine's processes measure one at a time, and later ones read the first one's result: all
    must compute the same. Without a GPU nothing is measured, and the answer is True.
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
    """Measure these cases anew: {name: milliseconds}. Later runs on this card go by them."""
    index = card_index(device)
    with _alone(choices_path(index)):
        times = {case.name: measure(case, index) for case in cases}
        keep(times, index)
    return times


def keep(times: Mapping[str, Times], index: int) -> dict[str, bool]:
    """Record which kernels run on the card with this index from now on: {name: whether ours}.

    Ours must take at most `GAIN` of the time; a tie goes to torch.compile. A case that did not run
    is not recorded, as it may run tomorrow.
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
    """Whether ours runs and is clearly faster."""
    ours, compiled = times
    return ours < math.inf and ours <= GAIN * compiled


def choices_path(index: int) -> Path:
    """File of a card's choices; each release of torch has its own, as it may compile better."""
    table = table_path(torch.cuda.get_device_name(index), capability(index), triton.__version__)
    return table.with_name(f"{table.stem}-torch-{torch.__version__.split('+')[0]}-rows.json")


def measure(case: RowCase, index: int) -> Times:
    """Time both on the card with this index; leaves torch's generators as they were."""
    # A warning, to be shown by default: half a minute of silence would look like a hang.
    logger.warning("measuring %s beside torch.compile's, once for this card and these releases", case.name)
    with torch.cuda.device(index), torch.random.fork_rng(devices=[index]):
        times = _milliseconds(case, ours=True), _milliseconds(case, ours=False)
        torch.cuda.empty_cache()
    return times


def _milliseconds(case: RowCase, ours: bool) -> float:
    """Forward and backward of one; infinite if it does not run here."""
    from triton.testing import do_bench

    try:
        milliseconds: float = do_bench(training_step(case, ours, "cuda"), return_mode="median")
    except Exception as error:  # Compilers and drivers fail in many ways; all mean: it cannot run.
        name, reason = "our kernel" if ours else "torch.compile's", str(error).strip().partition("\n")[0]
        logger.warning("%s: %s does not run here: %s", case.name, name, reason)
        return math.inf
    return milliseconds


def training_step(case: RowCase, ours: bool, device: str, num_rows: int = ROWS) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward and backward over tensors of `num_rows`; it returns all gradients."""
    compute = operator(case.kernel, ours)
    num_large, num_parameters, numbers = (2, 3, (case.dropout, 1e-12)) if case.kernel == LAYER_NORM else (1, 1, ())
    sizes = [(num_rows, case.width)] * num_large + [(case.width,)] * num_parameters
    inputs = [torch.randn(size, device=device, dtype=case.dtype, requires_grad=True) for size in sizes]
    dy = torch.randn(num_rows, case.width, device=device, dtype=case.dtype)
    return lambda: torch.autograd.grad(compute(*inputs, *numbers), inputs, dy)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the machine's lock; without one where a lock cannot be had."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock"), timeout=LONGEST_WAIT))
        yield


def _read(path: Path) -> dict[str, bool]:
    """The card's choices; empty if nothing was measured, or other kernels were."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["kernels"] != _digest():
            return {}
        return {str(name): answer is True for name, answer in table["kept"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _digest() -> str:
    return digest(gelu.__file__, layer_norm.__file__, row_philox.__file__, compiled_rows.__file__)
