"""The page of errors: what it finds in sources, how it splits a text, and what it objects to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
ERRORS = '''
class UserError(Exception):
    """Any."""
    exit_code = 1

class ConfigError(UserError):
    """The run file is wrong."""
    exit_code = 2

class WireError(UserError):
    """The other side."""
    exit_code = 5

class ConnectionLost(WireError):
    """Gone."""
'''


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("errors_page_under_test", ROOT / ".ci" / "errors_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tree(folder: Path, source: str, name: str = "fedbert_ds/data/text.py") -> Path:
    (folder / "fedbert_ds").mkdir()
    (folder / "fedbert_ds" / "errors.py").write_text(ERRORS)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(source)
    return folder


def rows(made: ModuleType, root: Path) -> list[tuple[str, str, str]]:
    return [(entry.said, entry.remedy, entry.code) for entry in made.entries(root)]


@pytest.mark.parametrize(
    ("source", "said", "remedy", "code"),
    [
        ('raise ConfigError(f"{path}: too long; cut it")', "<path>: too long", "cut it", "2"),
        ('raise ConnectionLost(f"{self._address}: gone; come back")', "<address>: gone", "come back", "5"),
        (
            'warn(f"{len(names)} names (a; b) are odd; mend them")',
            "<number of names> names (a; b) are odd",
            "mend them",
            "",
        ),
        (
            "raise ConfigError(f\"--size {options.size}: choose {', '.join(SIZES)}\")",
            "--size <size>",
            "choose <sizes>",
            "2",
        ),
        ('raise ConfigError(f"it failed (see {log})")', "it failed", "see <log>", "2"),
        ('raise ConfigError(f"{key}: {kinds}, not {value!r}")', "<key>: not <value>", "give <kinds>", "2"),
        ('def f():\n    raise ConfigError(f"at most {MOST}; lower it")\nMOST = 7', "at most 7", "lower it", "2"),
        ('raise WireError(f"{who}: no: {details}")', "<who>: no: <details>", "do what it says", "5"),
        ('raise ConfigError("one" " and two; " "mend it")', "one and two", "mend it", "2"),
    ],
)
def test_a_text_is_split_into_what_happened_and_what_to_do(
    made: ModuleType, tmp_path: Path, source: str, said: str, remedy: str, code: str
) -> None:
    assert rows(made, tree(tmp_path, source)) == [(said, remedy, code)]


def test_every_text_that_an_error_can_have_is_a_row(made: ModuleType, tmp_path: Path) -> None:
    source = (
        "def check(name):\n"
        "    who = f'client {name}'\n"
        "    raise ConfigError(f\"{who}: {'late' if name else 'early'}; wait\")\n"
        "def reason(day):\n"
        "    if day: return f'over since {day}; renew it'\n"
        "    return 'not yet; check the clock'\n"
        "def use(file):\n"
        "    raise WireError(f'{file}: {reason(3)}')\n"
    )
    assert sorted(rows(made, tree(tmp_path, source))) == [
        ("<file>: not yet", "check the clock", "5"),
        ("<file>: over since <day>", "renew it", "5"),
        ("client <name>: early", "wait", "2"),
        ("client <name>: late", "wait", "2"),
    ]


def test_what_is_passed_on_is_no_row_of_its_own(made: ModuleType, tmp_path: Path) -> None:
    assert rows(made, tree(tmp_path, "def f(reason):\n    raise WireError(reason)\n")) == []


def test_checks_of_the_run_file_are_rows_and_other_value_errors_are_bugs(made: ModuleType, tmp_path: Path) -> None:
    root = tree(tmp_path, "raise ValueError('wrong; mend it')\n", "fedbert_ds/config.py")
    (root / "fedbert_ds" / "seeding.py").write_text("raise ValueError('a bug')\n")
    assert rows(made, root) == [("wrong", "mend it", "2")]


def test_an_error_without_a_remedy_is_told(made: ModuleType, tmp_path: Path) -> None:
    root = tree(tmp_path, "raise ConfigError('it is wrong')\nraise WireError('a second manifest')\n")
    told = made.without_remedy(root)
    assert len(told) == 1 and 'ConfigError("it is wrong")' in told[0]
    page = made.page(root)
    assert "| a second manifest |" in page.split("## Broken protocol")[1]


def test_a_new_package_is_a_section_of_its_own(made: ModuleType, tmp_path: Path) -> None:
    page = made.page(tree(tmp_path, "raise ConfigError('odd | a*b; mend [it]')\n", "fedbert_ds/new_room/file.py"))
    assert "## New room\n" in page and r"| odd \| a\*b | mend \[it\] | 2 |" in page


def test_a_script_that_fails_is_a_row(made: ModuleType, tmp_path: Path) -> None:
    root = tree(tmp_path, "")
    (root / "launchers").mkdir()
    (root / "launchers" / "go.sbatch").write_text('[[ -f $shard ]] || fail "$shard: not there; set DATA_DIR"\n')
    assert rows(made, root) == [("<shard>: not there", "set DATA_DIR", "1")]
