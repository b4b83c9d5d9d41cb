"""A run's folder: what a run that starts or resumes must find."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedbert_ds.config import AggregatorSection, RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.run_file import load_config
from fedbert_ds.server.checkpoint_folder import COMPLETE, Layout
from fedbert_ds.server.run_folder import UNCHANGED, RunFolder, check_folder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


# -- fit to start, fit to resume -------------------------------------------------------------------


@pytest.fixture
def saved(folder: RunFolder) -> RunConfig:
    """A run of 2 ranks that saved window 5; its run file."""
    config = load_config(ROOT / "configs" / "default.yaml", [f"run.directory={folder.path}"])
    folder.write_config(config)
    folder.checkpoints.draft.of(5).mkdir(parents=True)
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
        ("model.hidden_size=64", "model.hidden_size"),
        ("cut=rows", "cut"),
        ("task={name: sequence_regression}", "task.name"),
        ("tokenizer.vocab_size=99", "tokenizer.vocab_size"),
        ("data.sequence_length=16", "data.sequence_length"),
        ("federation.mode=parallel", "federation.mode"),
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
    with pytest.raises(RunError, match=rf"^{key} is \S+ now and was \S+ when .* was saved; change it back"):
        check_folder(folder, changed, resume=True)


def test_every_key_that_must_not_change_is_tried_above() -> None:
    (mark,) = (m for m in test_what_must_not_change_is_named.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    tried = [key for _, key in mark.args[1]]
    assert all(any(f"{key}.".startswith(f"{name}.") for key in tried) for name in UNCHANGED)


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ("[python-docs, b.txt]", "has b.txt now, unlike when "),
        ("[b.txt]", "has b.txt now and has not python-docs now, unlike when "),
    ],
)
def test_of_a_list_that_changed_only_the_change_is_told(
    folder: RunFolder, saved: RunConfig, sources: str, sentence: str
) -> None:
    overrides = [f"run.directory={folder.path}", f"data.source={sources}"]
    with pytest.raises(RunError, match=rf"^data\.source {re.escape(sentence)}.* was saved; change it back"):
        check_folder(folder, load_config(ROOT / "configs" / "default.yaml", overrides), resume=True)


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
