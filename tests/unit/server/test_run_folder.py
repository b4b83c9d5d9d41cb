"""A run's folder: which checkpoints count, however a run ends, and what a run that starts or
resumes must find.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.config import AggregatorSection, RunConfig, load_config
from fedbert_ds.errors import RunError
from fedbert_ds.server.run_folder import COMPLETE, UNCHANGED, CheckpointFolder, Layout, RunFolder, check_folder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def checkpoints(folder: RunFolder) -> CheckpointFolder:
    return folder.checkpoints


def written(checkpoints: CheckpointFolder, window: int) -> Path:
    """What DeepSpeed leaves before the checkpoint is complete."""
    part = checkpoints.of(window)
    part.mkdir(parents=True, exist_ok=True)
    (part / "optimizer.pt").write_bytes(b"x")
    return part


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_counts_once_it_is_marked(checkpoints: CheckpointFolder) -> None:
    assert checkpoints.complete_windows() == frozenset()
    written(checkpoints, 5)
    assert checkpoints.complete_windows() == frozenset()
    checkpoints.mark_complete(5, Layout(3, 2))
    assert checkpoints.complete_windows() == {5} and checkpoints.layout(5) == Layout(ranks=3, zero_stage=2)


def test_the_newest_two_are_kept(checkpoints: CheckpointFolder) -> None:
    for window in (9, 10, 200):
        written(checkpoints, window)
        checkpoints.mark_complete(window, Layout(1, 0))
    assert checkpoints.complete_windows() == {10, 200}, "by number, not by name"
    assert {path.name for path in checkpoints.path.iterdir()} == {"window-10", "window-200"}


def test_an_incomplete_checkpoint_is_neither_counted_nor_removed(checkpoints: CheckpointFolder) -> None:
    written(checkpoints, 1)
    for window in (2, 3, 4):
        written(checkpoints, window)
        checkpoints.mark_complete(window, Layout(1, 0))
    assert checkpoints.complete_windows() == {3, 4}
    assert checkpoints.of(1).is_dir()


def test_a_crash_while_removing_leaves_no_half_checkpoint_that_counts(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path) -> None:
        (path / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    for window in (1, 2):
        written(checkpoints, window)
        checkpoints.mark_complete(window, Layout(1, 0))
    written(checkpoints, 3)
    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.mark_complete(3, Layout(1, 0))
    assert checkpoints.complete_windows() == {2, 3}


def test_a_crash_while_marking_leaves_an_incomplete_checkpoint(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = written(checkpoints, 1)

    def full_disk(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoints.mark_complete(1, Layout(1, 0))
    assert not (part / COMPLETE).exists()
    assert checkpoints.complete_windows() == frozenset()


def test_a_run_removes_what_it_will_write_again(checkpoints: CheckpointFolder) -> None:
    """Another number of ranks writes other files: those of before would be left among them."""
    for window in (3, 6):
        written(checkpoints, window)
        checkpoints.mark_complete(window, Layout(4, 2))
    written(checkpoints, 1)
    written(checkpoints, 9)
    (checkpoints.path / "window-notes").mkdir()
    checkpoints.begin_at(3)
    assert {path.name for path in checkpoints.path.iterdir()} == {"window-3", "window-notes"}
    checkpoints.begin_at(0)
    assert checkpoints.complete_windows() == frozenset()
    CheckpointFolder(checkpoints.path / "nothing yet").begin_at(0)


@pytest.mark.parametrize("mark", ['{"window": 5, "ranks": 2}', "[]", "{", '{"ranks": 2, "zero_stage": "two"}'])
def test_a_mark_that_names_no_layout_is_one_line(checkpoints: CheckpointFolder, mark: str) -> None:
    written(checkpoints, 5)
    (checkpoints.of(5) / COMPLETE).write_text(mark)
    with pytest.raises(RunError, match=r'complete\.json: says not by how many ranks .*; add "ranks"') as caught:
        checkpoints.layout(5)
    assert "\n" not in str(caught.value)


# -- fit to start, fit to resume -------------------------------------------------------------------


@pytest.fixture
def saved(folder: RunFolder) -> RunConfig:
    """A run of 2 ranks that saved window 5; its run file."""
    config = load_config(ROOT / "configs" / "default.yaml", [f"run.directory={folder.path}"])
    folder.write_config(config)
    written(folder.checkpoints, 5)
    folder.checkpoints.mark_complete(5, Layout(2, 2))
    return config


def test_the_owner_of_the_client_model_stays(folder: RunFolder, saved: RunConfig) -> None:
    elsewhere = saved.model_copy(update={"aggregator": AggregatorSection(address="here:5", secret=Path("s"))})
    with pytest.raises(RunError, match=r"aggregator: .* was saved without this section"):
        check_folder(folder, elsewhere, resume=True)
    folder.write_config(elsewhere)
    with pytest.raises(RunError, match=r"aggregator: .* was saved with this section"):
        check_folder(folder, saved, resume=True)
    moved = elsewhere.model_copy(update={"aggregator": AggregatorSection(address="there:6", secret=Path("s"))})
    check_folder(folder, moved, resume=True)


def test_a_new_run_wants_an_empty_folder(folder: RunFolder) -> None:
    check_folder(folder, RunConfig(), resume=False)
    folder.path.mkdir()
    check_folder(folder, RunConfig(), resume=False)
    (folder.path / "notes.txt").touch()
    with pytest.raises(RunError, match="holds a run already; add --resume to continue it"):
        check_folder(folder, RunConfig(), resume=False)


def test_a_resumed_run_wants_its_own_folder(folder: RunFolder, saved: RunConfig) -> None:
    check_folder(folder, saved, resume=True)
    folder.config.unlink()
    with pytest.raises(RunError, match="no run to resume here"):
        check_folder(folder, saved, resume=True)


def test_a_run_that_saved_nothing_begins_again(folder: RunFolder, saved: RunConfig) -> None:
    (folder.checkpoints.of(5) / COMPLETE).unlink()
    check_folder(folder, saved, resume=True)
    another = load_config(ROOT / "configs" / "default.yaml", [f"run.directory={folder.path}", "run.seed=5"])
    with pytest.raises(RunError, match=r"^run\.seed is 5 now"):
        check_folder(folder, another, resume=True)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.hidden_size=64", "model"),
        ("cut=rows", "cut"),
        ("task={name: sequence_regression}", "task"),
        ("tokenizer.vocab_size=99", "tokenizer"),
        ("data.sequence_length=16", "data"),
        ("federation.mode=parallel", "federation"),
        ("wire.updates=int8", "wire.updates"),
        ("run.seed=5", "run.seed"),
        ("optimizer.name=sgd", "optimizer.name"),
        ("body.precision=bf16", "body.precision"),
        ("clients.expected=9", "clients.expected"),
        ("clients.local=1", "clients.local"),
    ],
)
def test_what_must_not_change_is_named(folder: RunFolder, saved: RunConfig, override: str, key: str) -> None:
    changed = load_config(ROOT / "configs" / "default.yaml", [f"run.directory={folder.path}", override])
    with pytest.raises(RunError, match=rf"^{key} is .* now and was .* when .* was saved; change it back"):
        check_folder(folder, changed, resume=True)


def test_every_key_that_must_not_change_is_tried_above() -> None:
    (mark,) = (m for m in test_what_must_not_change_is_named.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    assert tuple(key for _, key in mark.args[1]) == UNCHANGED


def test_a_run_does_not_end_before_what_it_has_saved(folder: RunFolder, saved: RunConfig) -> None:
    def shortened(windows: int) -> RunConfig:
        overrides = [f"run.directory={folder.path}", f"run.windows={windows}"]
        return load_config(ROOT / "configs" / "default.yaml", overrides)

    check_folder(folder, shortened(5), resume=True)
    with pytest.raises(RunError, match=r"is saved up to window 5, run\.windows is 4; raise it"):
        check_folder(folder, shortened(4), resume=True)


@pytest.mark.parametrize(
    "override", ["run.windows=900", "optimizer.lr=0.5", "wire.activations=int8", "kernels=torch", "body.zero_stage=3"]
)
def test_the_rest_may_change(folder: RunFolder, saved: RunConfig, override: str) -> None:
    changed = load_config(ROOT / "configs" / "default.yaml", [f"run.directory={folder.path}", override])
    check_folder(folder, changed, resume=True)


# -- the rest --------------------------------------------------------------------------------------


def test_a_run_that_failed_before_it_began_leaves_nothing_in_the_way(folder: RunFolder) -> None:
    folder.write_config(RunConfig())
    folder.held_out.write_text("{}")
    folder.remove()
    assert not folder.path.exists()
    folder.remove()


def test_a_run_keeps_the_id_it_drew(folder: RunFolder, tmp_path: Path) -> None:
    drawn = folder.identify()
    assert len(drawn) == 32 and folder.identify() == drawn
    assert RunFolder(tmp_path / "another").identify() != drawn
