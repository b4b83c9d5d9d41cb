"""What an owner installs: a whole wheel, and a client that needs the base packages alone."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from fedbert_ds.cli import build_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = {"fedbert_ds": "fedbert_ds", "fedbert_kernels": "kernels"}
"""Import name -> folder."""
PROJECTS = {"google": "protobuf", "grpc": "grpcio", "yaml": "pyyaml"}
"""Projects whose import name is another."""
MISSING = {
    *("apex", "cryptography", "datasets", "deepspeed", "hypothesis", "matplotlib", "msgpack", "pyarrow"),
    *("pytest", "rich", "scipy", "sklearn", "tensorboard", "torchao", "triton"),
}
"""Packages of the extras, which a client's environment lacks."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of what a client's container copies, built where no build was before."""
    setuptools = [one.version for one in metadata.distributions(name="setuptools")]
    if not setuptools or Version(setuptools[0]) < Version("77.0.3"):
        pytest.skip("setuptools is not here, or older than pyproject.toml asks for")
    folder = tmp_path_factory.mktemp("source")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in SOURCES.values():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = "import setuptools.build_meta as b; b.build_wheel('out')"
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    (built,) = (folder / "out").glob("*.whl")
    return built


def test_a_wheel_holds_every_module_and_file(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = {
        (Path(name) / path.relative_to(ROOT / folder)).as_posix()
        for name, folder in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Types of generated code are for whoever works on it.
    assert held == {name for name in source if not name.endswith(".pyi")}


def test_it_asks_for_what_a_client_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
    told = archive.read(name).decode()
    asked = [Requirement(line.removeprefix("Requires-Dist: ")) for line in told.splitlines() if "Requires-Dist" in line]
    always = {one.name for one in asked if one.marker is None}
    assert always == {Requirement(text).name for text in PYPROJECT["project"]["dependencies"]}


def test_a_client_starts_from_it_without_packages_of_the_extras(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(MISSING)!r}))\n"
        "import fedbert_ds, fedbert_kernels\nprint(fedbert_ds.__file__)\n"
        "import fedbert_ds.client.session\n"
        "from fedbert_ds.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", program, "client", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    first, *shown = result.stdout.splitlines()
    assert Path(first) == tmp_path / "fedbert_ds" / "__init__.py" and "--server" in " ".join(shown)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "installing.md"], ids=lambda path: path.name)
def test_the_lines_for_an_owner_name_this_wheel_and_parse(wheel: Path, page: Path) -> None:
    lines = re.findall(
        r"^(?:uvx --from|pipx run --spec) (\S+) fedbert-ds (.*)$", page.read_text(encoding="utf-8"), re.M
    )
    assert lines
    for name, arguments in lines:
        assert name == f"./{wheel.name}"
        assert build_parser().parse_args(shlex.split(arguments)).server == "HOST:29600"


def client_files() -> dict[Path, ast.Module]:
    """Every file of ours that a client imports, directly or through others, parsed."""
    found: dict[Path, ast.Module] = {}
    todo = ["fedbert_ds.cli"]
    while todo:
        name = todo.pop()
        top, _, rest = name.partition(".")
        place = ROOT / SOURCES[top] / rest.replace(".", "/")
        file = next((one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()), None)
        if file is None or file in found:
            continue
        found[file] = ast.parse(file.read_text(encoding="utf-8"))
        if name == "fedbert_ds.cli":
            # Its other commands are not a client's.
            todo += ["fedbert_ds.client.session", "fedbert_ds.client.footprint", "fedbert_ds.client.limits"]
        else:
            todo += [one for one, _ in imports(found[file]) if one.partition(".")[0] in SOURCES]
    return found


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, and whether it does when it is imported itself."""
    at_once = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)} - {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in at_once
            yield from ((f"{node.module}.{alias.name}", id(node) in at_once) for alias in node.names)


def test_what_a_client_imports_is_among_its_dependencies() -> None:
    declared = {Requirement(text).name for text in PYPROJECT["project"]["dependencies"]}
    files = client_files()
    assert len(files) > 60
    tops = {name.partition(".")[0] for tree in files.values() for name, at_once in imports(tree) if at_once}
    others = {top for top in tops if top not in sys.stdlib_module_names and top not in SOURCES}
    assert "grpc" in others and not {PROJECTS.get(top, top).replace("_", "-") for top in others} - declared


def test_windows_memory_is_read_by_a_package_that_comes_along() -> None:
    """Where there is no `resource`: psutil is accelerate's dependency, which is a client's."""
    assert "psutil" in {Requirement(text).name for text in metadata.requires("accelerate") or ()}


UNIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def test_a_client_imports_no_module_that_windows_lacks() -> None:
    """Not when it is imported: a function may, where it minds that there is none."""
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file, tree in client_files().items()
        for name, at_once in imports(tree)
        if at_once and name.partition(".")[0] in UNIX_ONLY
    }
    assert not wrong


def test_a_client_names_the_encoding_of_every_text_file() -> None:
    """The default is the machine's, which is cp1252 on many."""
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    command = [
        ruff,
        "check",
        "--preview",
        "--select",
        "PLW1514",
        "--output-format",
        "concise",
        *map(str, client_files()),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
