"""Chooses between ways to compute the same on a card: each is timed once, and a file keeps it.

Which way is fastest depends on card, shape and releases, so each is timed on the card, before a run
starts. The outcome is a file under ~/.cache (or $XDG_CACHE_HOME), with all times, and the reason of
every way that was left out. `fedbert-ds bench kernels --tune` measures again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from torch import distributed

from fedbert_kernels.attention_launches import capability, card_index
from fedbert_kernels.interpreter import triton
from fedbert_kernels.launch import GAIN, table_path, write_json

OURS = "ours"
LONGEST_WAIT = 300.0
"""Seconds for another process to measure: one that hangs, or a stuck lock, must not stop a run."""

logger = logging.getLogger(__name__)


class Case(Protocol):
    """One thing to compute, in one shape, and the ways to compute it."""

    @property
    def name(self) -> str:
        """Key of its measurement."""

    @property
    def default(self) -> str:
        """The way that runs unless another is clearly faster."""

    @property
    def off_gpu(self) -> str:
        """The way where nothing is measured."""

    @property
    def digest(self) -> str:
        """Digest of our sources: other code is to be measured anew."""

    def releases(self) -> dict[str, str]:
        """{way: release of its package, empty without one}, of the ways that this machine has."""

    def missing(self) -> dict[str, str]:
        """{way: what this machine or case lacks for it}."""

    def step(self, way: str, device: torch.device) -> Callable[[], object]:
        """A call of forward and backward, to be timed. Raises if the way cannot run or is wrong."""


@dataclass(frozen=True)
class Outcome:
    """A case's measurement."""

    chosen: str
    milliseconds: dict[str, float]
    """Of each way that ran: forward and backward, median."""
    left_out: dict[str, str]
    """{way: why}."""
    releases: dict[str, str]
    """As the case had them."""
    digest: str

    def is_of(self, case: Case) -> bool:
        """Whether these sources and packages were measured."""
        return self.digest == case.digest and self.releases == case.releases()


def kept(cases: Iterable[Case], device: torch.device) -> dict[str, str]:
    """{name of a case: the way that runs on this card}, measured now if not yet known.

    A machine's processes measure one at a time, and later ones read the first one's result: all
    must compute the same. Ranks of several machines call this together; where two have measured
    differently, all take the default. Without a GPU nothing is measured.
    """
    wanted = {case.name: case for case in cases}
    if device.type != "cuda":
        return {name: case.off_gpu for name, case in wanted.items()}
    index = card_index(device)
    known = _known(wanted, index)
    if not wanted.keys() <= known.keys():
        with _alone(choices_path(index)):
            known = _known(wanted, index)
            known |= _measure_all([case for name, case in wanted.items() if name not in known], index)
    chosen = {name: known[name].chosen for name in wanted}
    return agreed({name: case.default for name, case in wanted.items()}, _of_all_ranks(chosen))


def measure_again(cases: Iterable[Case], device: torch.device) -> dict[str, Outcome]:
    """Measure these cases anew: {name: outcome}. Later runs on this card go by them."""
    index = card_index(device)
    with _alone(choices_path(index)):
        return _measure_all({case.name: case for case in cases}.values(), index)


def choose(default: str, milliseconds: Mapping[str, float]) -> str:
    """The fastest way if it takes at most `GAIN` of the default's time, else the default.

    Ways that did not run are absent. If the default is, the fastest wins.
    """
    if not milliseconds:
        return default
    fastest = min(milliseconds, key=lambda way: (milliseconds[way], way))
    return fastest if milliseconds[fastest] <= GAIN * milliseconds.get(default, math.inf) else default


def agreed(defaults: Mapping[str, str], of_ranks: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """{name: what every rank has chosen, or the default where two ranks differ}."""
    ranks = list(of_ranks)
    chosen = {name: {rank[name] for rank in ranks} for name in defaults}
    return {name: chosen[name].pop() if len(chosen[name]) == 1 else default for name, default in defaults.items()}


def measure(case: Case, index: int) -> tuple[Outcome, bool]:
    """Time every way on the card with this index; and whether the outcome is to be recorded.

    It is not if a way found too little memory, as there may be enough tomorrow. Torch's generators
    are left as they were.
    """
    # A warning, to be shown by default: half a minute of silence would look like a hang.
    logger.warning("measuring %s, once for this card and these releases", case.name)
    releases = case.releases()
    milliseconds: dict[str, float] = {}
    left_out = case.missing()
    is_final = True
    with torch.cuda.device(index), torch.random.fork_rng(devices=[index]):
        for way in releases:
            try:
                milliseconds[way] = _milliseconds(case.step(way, torch.device("cuda", index)))
            except Exception as error:  # Compilers and drivers fail in many ways; all mean: not here.
                is_final &= not isinstance(error, torch.cuda.OutOfMemoryError)
                left_out[way] = str(error).strip().partition("\n")[0] or type(error).__name__
            torch.cuda.empty_cache()
    for way, reason in left_out.items():
        logger.warning("%s: %s is left out: %s", case.name, way, reason)
    return Outcome(choose(case.default, milliseconds), milliseconds, left_out, releases, case.digest), is_final


def choices_path(index: int) -> Path:
    """File of a card's choices; each release of torch has its own, as it may compile better."""
    table = table_path(torch.cuda.get_device_name(index), capability(index), triton.__version__)
    return table.with_name(f"{table.stem}-torch-{torch.__version__.split('+')[0]}-choices.json")


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, return_mode="median")
    return milliseconds


def _measure_all(cases: Iterable[Case], index: int) -> dict[str, Outcome]:
    """Measure and record; the caller holds the lock."""
    path, outcomes, recorded = choices_path(index), {}, {}
    for case in cases:
        outcomes[case.name], is_final = measure(case, index)
        if is_final:
            recorded[case.name] = asdict(outcomes[case.name])
    try:
        write_json(path, {"outcomes": dict(sorted((_read(path) | recorded).items()))})
    except OSError as error:
        logger.warning("%s cannot be written (%s): every start will measure anew", path, error)
    return outcomes


def _known(cases: Mapping[str, Case], index: int) -> dict[str, Outcome]:
    """Outcomes in the card's file that are of these cases."""
    table, known = _read(choices_path(index)), {}
    for name, case in cases.items():
        with contextlib.suppress(TypeError):  # written by another version, or damaged
            outcome = Outcome(**table[name]) if name in table else None
            if outcome is not None and outcome.is_of(case):
                known[name] = outcome
    return known


def _read(path: Path) -> dict[str, Any]:
    """{name: an outcome's fields}; empty if there is no such file."""
    try:
        outcomes = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
        return dict(outcomes) if isinstance(outcomes, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _of_all_ranks(chosen: dict[str, str]) -> list[dict[str, str]]:
    """Every rank's choices, in a run of several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [chosen]
    everybody: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everybody, chosen)
    return everybody


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the machine's lock; without one where a lock cannot be had."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock"), timeout=LONGEST_WAIT))
        yield
