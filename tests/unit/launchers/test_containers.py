"""The container files without a container engine: linters' verdicts, what they copy, the commands
they run and the run file of the compose file. No image is built here.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbert_ds.cli import build_parser
from fedbert_ds.run_file import load_config
from fedbert_ds.wire.identity import is_name

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "launchers" / "containers"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
DEFINITION = FOLDER / "gpu-node.def"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OWNERS = [name for name, service in SERVICES.items() if service["image"] == "fedbert-ds-client"]


def installed(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, its lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def of(dockerfile: Path, word: str) -> list[str]:
    return [rest for one, rest in instructions(dockerfile) if one == word]


def section(name: str) -> str:
    """A section of the Apptainer definition."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def words(command: str | list[str]) -> list[str]:
    """A compose command as its program gets it, every variable at its default."""
    parts = shlex.split(command) if isinstance(command, str) else command
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", part) for part in parts]


@pytest.mark.skipif(installed("hadolint") is None, reason="hadolint is not installed")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    command = [str(installed("hadolint")), "--no-color", str(dockerfile)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(installed("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["post", "environment", "runscript"])
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    command = [str(installed("shellcheck")), "--shell", "sh", "-"]
    result = subprocess.run(command, input=section(name), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_every_base_image_has_a_version() -> None:
    bases = [base for path in DOCKERFILES for base in (*of(path, "FROM"), *of(path, "ARG")) if ":" in base]
    bases += re.findall(r"^From: (.+)$", DEFINITION.read_text(encoding="utf-8"), re.MULTILINE)
    bases += [service["build"]["args"]["BASE"] for service in SERVICES.values() if "BASE" in service["build"]["args"]]
    assert len(bases) == 5
    assert not [base for base in bases if not re.search(r":[\w.-]*\d+\.\d+", base)]


def test_one_gpu_image_and_one_apptainer_file_have_the_same_base() -> None:
    base = re.findall(r"^From: (.+)$", DEFINITION.read_text(encoding="utf-8"), re.MULTILINE)
    assert of(FOLDER / "gpu-node.Dockerfile", "ARG")[0] == f"BASE={base[0]}"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_nothing_else_enters(dockerfile: Path) -> None:
    copied = {source for line in of(dockerfile, "COPY") for source in line.split()[:-1]}
    assert {"pyproject.toml", "fedbert_ds", "kernels"} <= copied
    assert not [source for source in copied if not (ROOT / source).exists()]
    # The context's other files, keys and text among them, must not even be sent to the builder.
    rules = (FOLDER / f"{dockerfile.name}.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_what_apptainer_copies_is_there() -> None:
    pairs = [line.split() for line in section("files").splitlines() if line.strip()]
    assert not [source for source, _ in pairs if not (ROOT / source).exists()]
    assert all(place == f"/opt/fedbert-ds/{source}" for source, place in pairs)
    gpu_node = {source for line in of(FOLDER / "gpu-node.Dockerfile", "COPY") for source in line.split()[:-1]}
    assert {source for source, _ in pairs} == gpu_node - {"constraints.txt"}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_nothing_runs_as_root(dockerfile: Path) -> None:
    # One number, so that a volume which both sides mount can be read by both.
    assert of(dockerfile, "USER") == ["1000:1000"]


def test_entry_points_are_commands_of_ours() -> None:
    assert json.loads(of(FOLDER / "client.Dockerfile", "ENTRYPOINT")[0]) == ["fedbert-ds", "client"]
    program = json.loads(of(FOLDER / "gpu-node.Dockerfile", "ENTRYPOINT")[0])
    assert program == ["torchrun", "--standalone", "/opt/fedbert-ds/launchers/pretrain.py"]
    assert shlex.join(program) in section("runscript")
    with pytest.raises(SystemExit) as shown:
        build_parser().parse_args(["client", *json.loads(of(FOLDER / "client.Dockerfile", "CMD")[0])])
    assert shown.value.code == 0


def test_the_comments_commands_parse() -> None:
    """The usage on top of the client's file, from the image's name on."""
    text = (FOLDER / "client.Dockerfile").read_text(encoding="utf-8")
    usage = re.sub(r" \\\n#\s+", " ", text).split("fedbert-ds-client --server", 1)[1].split("\n", 1)[0]
    options = build_parser().parse_args(["client", "--server", *shlex.split(usage)])
    assert options.data == ["/data"] and options.key == Path("/certs/hospital-a.key")


def certificates() -> dict[str, list[str]]:
    """What the service `certs` makes: kind of certificate -> names."""
    made: dict[str, list[str]] = {}
    script = SERVICES["certs"]["command"][0]
    for line in script.splitlines():
        if line.startswith("fedbert-ds "):
            options = build_parser().parse_args(shlex.split(line)[1:])
            assert options.dir == Path("/certs")
            made.setdefault(shlex.split(line)[2], []).append(getattr(options, "name", ""))
    assert script.startswith("test ! -f /certs/hospital-c.pem || exit 0\n"), "a second start makes none anew"
    return made


def test_compose_has_a_server_and_three_owners_with_certificates() -> None:
    config = load_config(FOLDER / "run.yaml")
    made = certificates()
    assert made["server"] == ["server"] == [config.server.advertise] and "server" in SERVICES
    assert made["client"] == OWNERS == list(config.clients.allowed) and len(OWNERS) == 3
    assert config.clients.local == 0 and config.clients.expected == 3
    assert config.server.tls is not None and str(config.server.tls.certificate) == "/certs/server.pem"


@pytest.mark.parametrize("name", OWNERS)
def test_compose_starts_each_client_with_its_own_files(name: str) -> None:
    service = SERVICES[name]
    options = build_parser().parse_args(["client", *words(service["command"])])
    port = load_config(FOLDER / "run.yaml").server.port
    assert options.server == f"server:{port}" and is_name(name)
    assert (options.ca, options.certificate, options.key) == tuple(
        Path("/certs") / file for file in ("ca.pem", f"{name}.pem", f"{name}.key")
    )
    mounted = {volume.removesuffix(":ro").rsplit(":", 1)[1] for volume in service["volumes"]}
    assert mounted == {"/data", "/certs", "/state"} and options.state.parts[1] == "state" and options.data == ["/data"]
    assert f"{name}:/state" in service["volumes"] and name in COMPOSE["volumes"]


def test_compose_starts_the_server_with_a_run_file_of_its_image() -> None:
    service = SERVICES["server"]
    option, file, *overrides = words(service["command"])
    assert option == "--config" and file == "/opt/fedbert-ds/launchers/containers/run.yaml"
    config = load_config(ROOT / Path(file).relative_to("/opt/fedbert-ds"), overrides)
    assert str(config.run.directory).startswith("/runs/") and "runs:/runs" in service["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_compose_builds_with_files_that_are_there(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    # A build argument that the Dockerfile lacks would be dropped without a word.
    known = {line.partition("=")[0] for line in of(ROOT / build["dockerfile"], "ARG")}
    assert set(build["args"]) <= known
    named = [volume.split(":")[0] for volume in SERVICES[name]["volumes"]]
    assert not [volume for volume in named if not volume.startswith("$") and volume not in COMPOSE["volumes"]]
