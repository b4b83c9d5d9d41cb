"""What an installation puts where: package names, and peace with Hugging Face's `kernels`."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def requirements(path: Path) -> list[Requirement]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_package_folder_is_listed():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fedbert_ds").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names | {"fedbert_kernels"}


def test_installed_names_leave_kernels_alone():
    top_level = metadata.distribution("fedbert-ds").read_text("top_level.txt")
    assert top_level is not None
    assert set(top_level.split()) == {"fedbert_ds", "fedbert_kernels"}


def test_console_script_is_installed():
    (script,) = metadata.entry_points(group="console_scripts", name="fedbert-ds")
    assert script.value == "fedbert_ds.cli:main"


def test_hugging_face_kernels_wins_over_our_folder(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text('"""Stands in for the real package."""\n__version__ = "0.18.2"\n')
    information = tmp_path / "kernels-0.18.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    program = (
        "import sys; assert sys.path[0] == '', sys.path\n"
        "import kernels, fedbert_kernels\n"
        "from transformers.utils.import_utils import _is_package_available\n"
        "print(kernels.__file__, list(fedbert_kernels.__path__)[0])\n"
        "print(*_is_package_available('kernels', True))\n"
    )
    # `-c` puts the current folder, which holds our kernels/, first on the path: the worst case.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("PYTHONSAFEPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    found, ours, available, version = result.stdout.split()
    assert Path(found) == package / "__init__.py"
    assert Path(ours) == ROOT / "kernels"
    assert (available, version) == ("True", "0.18.2")


def test_kernels_folder_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would hide Hugging Face's kernels; see kernels/README.md"
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_lie_within_the_ranges(python):
    environment = {"python_version": python, "sys_platform": "linux", "extra": ""}
    pins = {
        pin.name: pin
        for pin in requirements(ROOT / "constraints.txt")
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    project = PYPROJECT["project"]
    extras = [text for name in ("server", "data", "glue", "dev") for text in project["optional-dependencies"][name]]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        pin = pins[requirement.name.lower()]
        versions = [specifier.version for specifier in pin.specifier]
        assert all(requirement.specifier.contains(version) for version in versions), f"{pin} is outside {requirement}"


def test_pins_name_no_build_and_no_host():
    for pin in requirements(ROOT / "constraints.txt"):
        assert pin.url is None
        assert all("+" not in specifier.version for specifier in pin.specifier)
    assert not any(line.startswith("-") for line in (ROOT / "constraints.txt").read_text().splitlines())
