"""Rules about the source: imports between rooms, sizes, modes named in federation/ alone, tests for
every room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fedbert_ds"
UNIT = ROOT / "tests" / "unit"

BASE = {
    "errors",
    "seeding",
    "atomic_write",
    "seals",
    "folder_lock",
    "numbered_files",
    "tokenizer_folder",
    "user_path",
    "config",
    "run_file",
}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "seeding": set(),
    "atomic_write": set(),
    "seals": {"atomic_write"},
    "folder_lock": {"atomic_write", "errors"},
    "numbered_files": {"atomic_write", "errors", "seals"},
    "tokenizer_folder": {"atomic_write", "errors"},
    "user_path": set(),
    "config": {"errors", "user_path"},
    "run_file": {"config", "errors"},
    "wire": BASE | {"kernels"},
    "model": BASE | {"kernels", "tasks"},
    "data": BASE,
    "telemetry": BASE,
    "tasks": BASE | {"data"},
    "glue": BASE | {"data", "model", "tasks", "telemetry"},
    "federation": BASE | {"model", "wire"},
    "evaluation": BASE | {"data", "model", "tasks"},
    "client": BASE | {"data", "federation", "model", "tasks", "wire"},
    # Another party's process: it listens as a rank does, and has nothing of the server else.
    "aggregator": BASE | {"federation", "model", "server.network", "tasks", "wire"},
    "server.queue": BASE | {"wire"},
    "server.contract": BASE | {"kernels", "server.queue"},
    "server.network": BASE | {"kernels", "server.contract", "wire"},
    "server.body": BASE | {"kernels", "model", "server.contract", "server.queue", "wire"},
    "server": BASE
    | {"data", "evaluation", "federation", "kernels", "model", "server.body", "server.contract"}
    | {"server.network", "server.queue", "tasks", "telemetry", "wire"},
    # Both replay a run: the planner on a clock, benchmarks with real processes.
    "planner": BASE | {"client", "federation", "model", "server.body", "server.queue", "telemetry", "wire"},
    "bench": BASE
    | {"client", "data", "evaluation", "federation", "kernels", "model", "server", "server.body", "server.contract"}
    | {"server.network", "server.queue", "telemetry", "wire"},
    # Starts what the others are: the launcher's processes, and fine-tuning of what they leave.
    "compare": BASE
    | {"bench", "client", "data", "evaluation", "federation", "glue", "model", "server", "server.queue"}
    | {"tasks", "telemetry"},
    "init": BASE | {"planner"},
    # Asks each side's own checks; what is light at a client imports no server.
    "doctor": BASE
    | {"client", "data", "model", "planner", "server", "server.body", "server.network", "telemetry", "wire"},
    "vocabulary": BASE | {"data", "telemetry"},
    "certificates": BASE | {"telemetry", "wire"},
    "cli": BASE
    | {
        "aggregator",
        "bench",
        "certificates",
        "client",
        "compare",
        "doctor",
        "evaluation",
        "glue",
        "init",
        "model",
        "planner",
    }
    | {"vocabulary", "wire"},
}
"""Rooms that each room may import. Client and server meet in wire/ only; kernels import no room."""

PURE = {
    "server/queue": {"errors", "server.queue", "wire"},
    "client/window_state.py": {"errors", "federation"},
    "federation/strategy.py": {"config"},
    "federation/sampler.py": {"seeding"},
}
"""Rooms without tensors, network, threads and clock, and the rooms that they may import."""
IMPURE = {"torch", "numpy", "grpc", "time", "threading", "queue", "asyncio", "socket", "subprocess", "os", "pathlib"}

TESTED_ELSEWHERE = {
    "server/contract.py": "data; whoever checks it is tested",
    "server/queue/decisions.py": "data; what the queue decides is tested",
    "server/serve.py": "wires the rooms; whole runs are tested, integration/test_runs.py",
}


def modules(*folders: str) -> list[Path]:
    """Hand-written source files below these folders of the package; all by default."""
    roots = [PACKAGE / folder for folder in folders] if folders else [PACKAGE]
    return sorted(path for root in roots for path in root.rglob("*.py") if "_pb2" not in path.name)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """The room of a dotted name. None outside the project, and for its `__version__`."""
    if name.split(".")[0] == "fedbert_kernels":
        return "kernels"
    first, *rest = name.split(".")
    if first != "fedbert_ds" or not rest or rest[0].startswith("__"):
        return None
    if rest[0] == "server" and len(rest) > 1 and f"server.{rest[1]}" in MAY_IMPORT:
        return f"server.{rest[1]}"
    return rest[0]


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", modules(), ids=named)
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    parts = [part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__"]
    here = room_of(".".join(parts))
    wrong = {room for name in imported(path) if (room := room_of(name)) and room != here} - MAY_IMPORT.get(
        here or "", set()
    )
    assert not wrong


def test_no_two_rooms_import_each_other() -> None:
    for room, below in MAY_IMPORT.items():
        assert not any(room in MAY_IMPORT.get(other, set()) for other in below), room


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_the_project(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("fedbert_ds")]


@pytest.mark.parametrize("place", PURE)
def test_pure_rooms_touch_neither_tensors_nor_network_nor_clock(place: str) -> None:
    files = modules(place) if (PACKAGE / place).is_dir() else [PACKAGE / place]
    for path in files:
        outside = {name.split(".")[0] for name in imported(path)}
        assert not outside & IMPURE, path
        own = {room_of(name) for name in imported(path)} - {
            None,
            "errors",
            room_of(f"fedbert_ds.{place.split('/')[0]}"),
        }
        assert own - {"server.queue"} <= PURE[place], path


@pytest.mark.parametrize("path", modules("server", "client", "federation", "aggregator"), ids=named)
def test_no_file_and_no_class_is_too_long_to_be_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
            assert len(methods) <= 20, node.name


MODES = {"synchronous", "parallel", "sequential"}


@pytest.mark.parametrize("path", [path for path in modules() if "federation" not in path.parts], ids=named)
def test_only_federation_knows_the_modes(path: Path) -> None:
    """No function elsewhere names a mode: it asks the strategy."""
    functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    strings = [n.value for function in functions for n in ast.walk(function) if isinstance(n, ast.Constant)]
    assert not MODES & {value for value in strings if isinstance(value, str)}


@pytest.mark.parametrize("path", modules(), ids=named)
def test_nothing_that_is_installed_unpickles(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "cPickle", "dill", "shelve", "marshal"}


def test_every_room_has_its_tests() -> None:
    missing = [
        named(path)
        for path in modules()
        if not path.name.startswith("__")
        and not (UNIT / path.relative_to(PACKAGE).parent / f"test_{path.name}").is_file()
    ]
    assert sorted(set(missing) - TESTED_ELSEWHERE.keys()) == []


OF_OTHERS = {
    *("_attn_implementation", "_forward_hooks", "_global_mapping", "_python_dispatch"),
    # How a device is made of Python.
    *("_C", "_disabled_torch_function_impl", "_make_wrapper_subclass", "_setup_privateuseone_for_python_backend"),
    *("_local_scalar_dense", "_to_copy", "_unique2"),
}
"""Names of transformers and torch with an underscore and no public equivalent."""


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_test_reads_privates(path: Path) -> None:
    """No `thing._name`, except a test's own `self._name` and names that Python itself spells so."""
    own = {node.name for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)}
    found = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in OF_OTHERS
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls", "os", "sys"} | own)
    ]
    assert not found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_path_on_a_command_line_is_a_user_path(path: Path) -> None:
    for call in ast.walk(tree_of(path)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            types = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "type"]
            assert types not in (["Path"], ["pathlib.Path"]), f"line {call.lineno}: use user_path"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_code_that_comes_with_a_model_is_never_run(path: Path) -> None:
    """transformers asks on standard input where a call does not say so."""
    for call in ast.walk(tree_of(path)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
            told = {keyword.arg for keyword in call.keywords}
            # None is a mapping that is passed on; those hold it.
            assert told & {"trust_remote_code", None}, f"line {call.lineno}"
