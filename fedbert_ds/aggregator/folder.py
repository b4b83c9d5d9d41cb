"""The aggregator's folder: references of saved windows, the newest two, and the final client
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedbert_ds.atomic_write import write_text
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.federation.reference import Reference, Shapes, from_bytes, to_bytes
from fedbert_ds.folder_lock import check_usable, holds_nothing
from fedbert_ds.model.halves import CLIENT_MODEL, write_client_model
from fedbert_ds.numbered_files import NumberedFiles
from fedbert_ds.run_file import dump_config


def folder_of(config: RunConfig) -> AggregatorFolder:
    """The folder that a run file names."""
    assert config.aggregator is not None
    directory = config.run.directory
    return AggregatorFolder(config.aggregator.directory or directory.with_name(f"{directory.name}-aggregator"))


Votes = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class AggregatorFolder:
    """File names below the folder. It is not the server's run folder: another party owns it."""

    path: Path

    @property
    def client_model(self) -> Path:
        """The final client model, for `fedbert-ds merge`."""
        return self.path / CLIENT_MODEL

    def check(self, resume: bool) -> None:
        """Raises RunError, before anything is written, if the folder does not fit a run that starts
        or resumes.
        """
        check_usable(self.path, "aggregator.directory")
        holds_run = not holds_nothing(self.path)
        if holds_run and not resume:
            raise RunError(f"{self.path}: holds a run already; add --resume, or set another aggregator.directory")
        if resume and not holds_run:
            raise RunError(f"{self.path}: no run to resume here; drop --resume or set aggregator.directory")

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved run file."""
        write_text(self.path / "config.yaml", dump_config(config))

    @property
    def _references(self) -> NumberedFiles:
        return NumberedFiles(self.path, "reference", ".safetensors")

    def saved_windows(self) -> tuple[int, ...]:
        """Windows with a saved reference, ascending."""
        return self._references.numbers()

    def whole_windows(self, tell: Callable[[str], None]) -> tuple[int, ...]:
        """Those whose reference is as it was saved; `tell` hears of others. RunError if none is."""
        return self._references.whole(tell)

    def save(self, window: int, reference: Reference, votes: Votes | None = None) -> None:
        """Write the reference before `window`, and what a combiner remembers; on disk when this
        returns. Keeps the newest two.
        """
        notes = {"votes": votes or {}}
        self._references.save(window, lambda path: path.write_bytes(to_bytes(reference, notes)))

    def load(self, window: int, shapes: Shapes) -> tuple[Reference, Votes]:
        """What `save` wrote before `window`. Later ones are deleted: the run goes on from here.

        Raises RunError if it is missing or damaged.
        """
        path = self._references.of(window)
        try:
            reference, notes = from_bytes(path.read_bytes(), shapes)
            votes = {client: (float(norm), float(masked)) for client, (norm, masked) in notes.get("votes", {}).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path}: cannot be read ({error}); remove it to resume from the one before, or start anew"
            ) from error
        self.begin_at(window)
        return reference, votes

    def begin_at(self, window: int) -> None:
        """The run goes on before `window`: what was saved of later windows is deleted."""
        self._references.begin_at(window)

    def write_result(self, weights: Mapping[str, Tensor], model_config: Any, cut: str, window: int) -> None:
        """Write the final client model, fp32 by name."""
        write_client_model(self.client_model, weights, model_config, cut, window)
