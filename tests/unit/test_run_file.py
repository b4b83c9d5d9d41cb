"""Run files are read: bases, overrides, values as they were written; each mistake is one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.config import LayersCut, RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.run_file import dump_config, load_config, parse_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def run_file(tmp_path: Path) -> Any:
    """A function that writes a run file."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def test_an_empty_file_is_the_defaults(run_file: Any) -> None:
    assert load_config(run_file("")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "not valid YAML"),
        ("run: {windows: 3", "not valid YAML"),
        (
            "optimizer: {lr: 0.1}\nrun: {}\noptimizer: {name: sgd}",
            "not valid YAML; .*: optimizer stands twice .*line 3",
        ),
        ("run:\n  windows: 3\n  windows: 4", "not valid YAML; .*: windows stands twice .*line 3"),
        ("run: {windows: 3, windows: 3}", "not valid YAML; .*: windows stands twice"),
        ("- run", "a run file is a mapping of sections"),
        ("run", "a run file is a mapping of sections"),
        ("run: {window: 3}", r"run\.window is not a key; did you mean run\.windows\?"),
        ("body: {deepspeed: nowhere.json}", r"body\.deepspeed: no such file nowhere\.json"),
    ],
)
def test_a_file_that_is_no_run_file(run_file: Any, text: str, message: str) -> None:
    path = run_file(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {message}"):
        load_config(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such run file; give one with --config"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no such run file"):
        load_config(tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"binary\.yaml: is not UTF-8; save it as UTF-8"):
        load_config(path)


def test_a_merged_key_may_stand_twice(run_file: Any) -> None:
    """That is what merging is for."""
    path = run_file("run: &run {windows: 5}\noptimizer: {<<: {lr: 0.1}, lr: 0.2}\n")
    assert load_config(path).optimizer.lr == 0.2


def test_overrides(run_file: Any) -> None:
    path = run_file("run: {windows: 5}\noptimizer: {lr: 1.0e-3}\n")
    config = load_config(
        path,
        [
            "run.windows=7",
            "optimizer.lr=1e-4",  # YAML 1.1 reads this as text
            "optimizer.betas=[0.8, 0.9]",
            "cut={layers: 1}",
            "model.checkpoint=null",
            "run.directory=runs/a=b",
            "run.windows=8",  # the last one counts
        ],
    )
    assert config.run.windows == 8
    assert config.optimizer.lr == 1e-4 and config.optimizer.betas == (0.8, 0.9)
    assert config.cut == LayersCut(layers=1)
    assert config.run.directory == Path("runs/a=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.windows", r"^run\.windows: an override has the form section\.key=value"),
        ("run.windows=[", r"^run\.windows=\[: not valid YAML"),
        ("run.windows=2020-99-99", r"run\.windows: input should be a valid integer"),
        ("run.windows.x=3", r"windows is not a section"),
        ("run.window=3", r"run\.window is not a key; did you mean run\.windows\?"),
        ("runs.windows=3", r"runs is not a key; did you mean run\?"),
        ("=3", r"is not a key"),
        ("run.windows=0", r"run\.windows: input should be greater than 0"),
    ],
)
def test_a_wrong_override(run_file: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(run_file("run: {windows: 5}"), [override])


def test_the_deepspeed_file_is_looked_for_beside_the_run_file_first(
    run_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for folder in (tmp_path, elsewhere):
        (folder / "deepspeed").mkdir(parents=True)
        (folder / "deepspeed" / "zero2.json").write_text("{}")
    (elsewhere / "own.json").write_text("{}")
    monkeypatch.chdir(elsewhere)
    beside = load_config(run_file("body: {deepspeed: deepspeed/zero2.json}"))
    assert beside.body.deepspeed == tmp_path / "deepspeed" / "zero2.json"
    assert load_config(run_file("body: {deepspeed: own.json}")).body.deepspeed == Path("own.json")
    absolute = elsewhere / "own.json"
    assert load_config(run_file(f"body: {{deepspeed: {absolute}}}")).body.deepspeed == absolute


def test_a_run_file_may_do_without_a_deepspeed_file(run_file: Any, tmp_path: Path) -> None:
    config = load_config(run_file("body: {deepspeed: null, zero_stage: 1}"))
    assert config.body.deepspeed is None
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_base_gives_what_a_file_leaves_out(run_file: Any, tmp_path: Path) -> None:
    (tmp_path / "bottom.yaml").write_text("run: {windows: 9, seed: 4}\ncut: {layers: 2}\nmodel: {num_hidden_layers: 3}")
    (tmp_path / "middle.yaml").write_text("base: bottom.yaml\nrun: {windows: 8}\nwire: {activations: int8}")
    config = load_config(run_file("base: middle.yaml\nrun: {save_every: 7}\ncut: {layers: 1}"), ["run.seed=5"])
    assert (config.run.windows, config.run.save_every, config.run.seed) == (8, 7, 5)
    assert (config.wire.activations, config.cut, config.model.num_hidden_layers) == ("int8", LayersCut(layers=1), 3)
    assert load_config(run_file("base: middle.yaml\ncut: rows")).cut == "rows"
    assert load_config(run_file("base: middle.yaml")) == load_config(tmp_path / "middle.yaml")


def test_a_base_elsewhere_has_its_deepspeed_file_beside_it(run_file: Any, tmp_path: Path) -> None:
    (tmp_path / "far" / "near").mkdir(parents=True)
    for folder in ("far", "far/near"):
        (tmp_path / folder / "own.json").write_text("{}")
    (tmp_path / "far" / "near" / "bottom.yaml").write_text("body: {deepspeed: own.json}")
    (tmp_path / "far" / "base.yaml").write_text("base: near/bottom.yaml")
    assert load_config(run_file("base: far/base.yaml")).body.deepspeed == tmp_path / "far" / "near" / "own.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml", r"mine\.yaml: base: \S+nowhere\.yaml: no such run file; give one$"),
        ("base: mine.yaml", r"mine\.yaml: is its own base; remove one of the keys `base`"),
        ("base: round.yaml", r"mine\.yaml: is its own base"),
        ("base: [a, b]", r"mine\.yaml: base is the name of another run file"),
        ("base: null", r"mine\.yaml: base is the name of another run file"),
        ("base: list.yaml", r"list\.yaml: a run file is a mapping of sections"),
        ("base: typo.yaml", r"mine\.yaml: run\.window is not a key"),
        ("base: good.yaml\nrun: 3", r"mine\.yaml: run: "),
        ("base: bad.yaml\nrun: {windows: 3}", None),
    ],
)
def test_a_base_that_is_none(run_file: Any, tmp_path: Path, text: str, message: str | None) -> None:
    others = {
        "round": "base: mine.yaml",
        "list": "- run",
        "typo": "run: {window: 3}",
        "good": "run: {}",
        "bad": "run: 3",
    }
    for name, content in others.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    if message is None:  # a section that is none gives way to one
        assert load_config(run_file(text)).run.windows == 3
        return
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(run_file(text))
    assert "\n" not in str(caught.value)


# -- round trip ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_come_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@settings(max_examples=60)
@given(
    lr=st.floats(1e-300, 1e300),
    eps=st.floats(1e-300, 1.0),
    timeout=st.floats(1e-3, 1e300),
    seed=st.integers(-(2**63), 2**63),
    directory=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8),
    source=st.lists(st.text(max_size=6), min_size=1, max_size=3),
    cut=st.sampled_from(["embeddings", "rows", {"layers": 1}]),
)
def test_a_resolved_file_comes_back_equal(
    lr: float, eps: float, timeout: float, seed: int, directory: str, source: list[str], cut: Any
) -> None:
    """Numbers keep all bits; text that looks like YAML stays text."""
    config = parse_config(
        {
            "run": {"directory": directory, "seed": seed},
            "data": {"source": source},
            "optimizer": {"lr": lr, "eps": eps},
            "clients": {"silence_timeout": timeout},
            "cut": cut,
        },
        "mine.yaml",
    )
    assert parse_config(yaml.safe_load(dump_config(config)), "config.yaml") == config


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.source=notes.txt", ("notes.txt",)),
        ("data.source=[a.txt, b.txt]", ("a.txt", "b.txt")),
        ("data.source=2024", ("2024",)),
        ("run.trackers=tensorboard", ("tensorboard",)),
        ("clients.allowed=ada", ("ada",)),
        ("clients.allowed=[17]", ("17",)),
        ("run.directory=2024-01-01", Path("2024-01-01")),
        ("run.directory=2024-01-01 12:30:00", Path("2024-01-01 12:30:00")),
        ("run.directory=2024", Path("2024")),
        ("run.directory=2024_01_01", Path("2024_01_01")),
        ("run.directory=007", Path("007")),
        ("run.directory=12:30", Path("12:30")),
        ("server.host=::", "::"),
        ("server.host=::1", "::1"),
        ("server.host=[::1]", "::1"),
        ("server.host=2001:db8::7", "2001:db8::7"),
        ("data.text_column=3", "3"),
        ("window.tokens=1_000", 1000),
        ("run.seed=-7", -7),
        ("optimizer.lr=1e-3", 0.001),
        ("body.compile=true", True),
    ],
)
def test_a_value_is_what_its_user_wrote_and_no_date_number_or_list(run_file: Any, override: str, expected: Any) -> None:
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(run_file(""), [override]), section), key) == expected


def test_a_file_s_dates_are_text_too_and_stay_so(run_file: Any, tmp_path: Path) -> None:
    config = load_config(run_file("run: {directory: 2024-01-01}\ndata: {source: notes-2024-05-06}\n"))
    assert (config.run.directory, config.data.source) == (Path("2024-01-01"), ("notes-2024-05-06",))
    assert load_config(run_file(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=", "data.source: must be a list, [ONE, TWO], not nothing"),
        ("data.source={a: 1}", 'data.source: must be a list, [ONE, TWO], not {"a": 1}'),
        ("data.source=[]", "data.source: must have at least one entry, not nothing"),
        (
            "run.directory=1.10",
            "run.directory: must be a path, in quotes where YAML takes it for something else, not 1.1",
        ),
        (
            "run.directory=",
            "run.directory: must be a path, in quotes where YAML takes it for something else, not nothing",
        ),
        (
            "data.source=[yes]",
            "data.source.0: must be a text, in quotes where YAML takes it for something else, not true",
        ),
        ("server.tls=x", 'server.tls: is a section, with a `key: value` in each line below it, not "x"'),
        ("run=", "run: is a section, with a `key: value` in each line below it, not nothing"),
    ],
)
def test_a_value_of_another_kind_is_told_without_words_of_python(run_file: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(run_file(""), [override])
    assert str(caught.value).endswith(message)
    assert not re.search("tuple|pathlib|dictionary|instance", str(caught.value))


def test_a_number_or_a_name_longer_than_a_line_is_cut(run_file: Any) -> None:
    with pytest.raises(ConfigError, match=r"not \{.{56}\.\.\.$"):
        load_config(run_file(""), [f"data.source={{a: {'x' * 500}}}"])
