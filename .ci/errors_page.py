"""docs/errors.md from the code: every one-line error that a user may see, with its remedy.

    python .ci/errors_page.py            write the page
    python .ci/errors_page.py --check    exit code 1 if it differs, or if an error has no remedy

The sources are read, never run. An error is a call of a class of fedbert_ds/errors.py with a text,
a `warn`, a `ValueError` of the run file's checks, or a `fail "..."` of a script. What an f-string
puts in is shown by its name: `{self._path}` as *path*. A remedy is what follows the first
semicolon, what a text asks for behind a colon ("choose ...", "at least 1"), or its "(see ...)". An
error that passes on the text of another says "do what it says".
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/errors.md"
COMMAND = "python .ci/errors_page.py"
FOLDERS = ("fedbert_ds", "kernels", "launchers")

TITLES = {
    "command": "The command line",
    "config": "The run file",
    "text": "Text",
    "tokenizer": "Tokenizer and vocabulary",
    "labels": "Labels and tasks",
    "model": "Model and checkpoint",
    "client": "A client",
    "join": "Reaching the server, joining and certificates",
    "aggregator": "Client updates and the aggregator",
    "folder": "The run folder and checkpoints",
    "server": "The server and its ranks",
    "body": "The body, DeepSpeed and GPUs",
    "evaluation": "Evaluation and metrics",
    "compare": "Comparing, planning and measuring",
    "glue": "GLUE",
    "slurm": "SLURM scripts",
}
"""Sections in the order of the page."""

ROOMS = {
    "fedbert_ds/cli.py": "command",
    "fedbert_ds/init": "command",
    "fedbert_ds/doctor": "command",
    "fedbert_ds/config.py": "config",
    "fedbert_ds/run_file.py": "config",
    "fedbert_ds/data/tokenizer.py": "tokenizer",
    "fedbert_ds/data/byte_bpe.py": "tokenizer",
    "fedbert_ds/tokenizer_folder.py": "tokenizer",
    "fedbert_ds/vocabulary": "tokenizer",
    "fedbert_ds/data": "text",
    "fedbert_ds/tasks": "labels",
    "fedbert_ds/model": "model",
    "fedbert_ds/client": "client",
    "fedbert_ds/wire/aggregation.py": "aggregator",
    "fedbert_ds/wire": "join",
    "fedbert_ds/certificates": "join",
    "fedbert_ds/server/admission.py": "join",
    "fedbert_ds/server/newcomers.py": "join",
    "fedbert_ds/server/network": "join",
    "fedbert_ds/federation": "aggregator",
    "fedbert_ds/aggregator": "aggregator",
    "fedbert_ds/server/control_line.py": "aggregator",
    "fedbert_ds/server/elsewhere.py": "aggregator",
    "fedbert_ds/server/remote_aggregator.py": "aggregator",
    "fedbert_ds/server/remote_exchange.py": "aggregator",
    "fedbert_ds/server/checkpoint.py": "folder",
    "fedbert_ds/server/checkpoint_folder.py": "folder",
    "fedbert_ds/server/run_folder.py": "folder",
    "fedbert_ds/folder_lock.py": "folder",
    "fedbert_ds/numbered_files.py": "folder",
    "fedbert_ds/seals.py": "folder",
    "fedbert_ds/atomic_write.py": "folder",
    "fedbert_ds/server/body": "body",
    "kernels": "body",
    "fedbert_ds/server": "server",
    "launchers/slurm": "slurm",
    "launchers": "server",
    "fedbert_ds/evaluation": "evaluation",
    "fedbert_ds/telemetry": "evaluation",
    "fedbert_ds/bench": "compare",
    "fedbert_ds/compare": "compare",
    "fedbert_ds/planner": "compare",
    "fedbert_ds/glue": "glue",
}
"""The section of a file or folder; the longest that fits. Another package is its own section."""

ASKS = re.compile(
    r": (?=(?:add|at least|at most|between|check|choose|drop|from|give|install|lower|make|must be|name|numbers? |only"
    r"|openssl|pip install|raise|remove|set|use|write|a (?:number|name|share) )\b)|: (?=each )"
)
MOST_WORDINGS = 16


@dataclass(frozen=True, order=True)
class Entry:
    """One row of the page: its section, what is said, the remedy ("" if none), the exit code."""

    section: str
    said: str
    remedy: str
    kind: str
    code: str


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file, in which every node knows its `parent`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def sources(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py") if "_pb2" not in path.name)


def exit_codes(root: Path) -> dict[str, str]:
    """Every class of errors.py below UserError, with its exit code."""
    codes: dict[str, str] = {}
    for node in tree_of(root / "fedbert_ds" / "errors.py").body:
        if isinstance(node, ast.ClassDef):
            own = [
                one.value for one in node.body if isinstance(one, ast.Assign) and _name(one.targets[0]) == "exit_code"
            ]
            above = [codes[base] for base in map(_name, node.bases) if base in codes]
            if own or above:
                codes[node.name] = ast.unparse(own[0]) if own else above[0]
    return codes


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# ------------------------------------------------------------------ what a text says


def placeholder(node: ast.expr) -> str:
    """The name of what is put in, for a reader: `len(names)` is <number of names>."""
    return f"<{_readable(node)}>"


def _readable(node: ast.expr) -> str:
    if isinstance(node, ast.Name | ast.Attribute):
        if isinstance(node, ast.Attribute) and node.attr == "__name__":
            return (
                f"kind of {_readable(node.value.args[0])}"
                if isinstance(node.value, ast.Call)
                else _readable(node.value)
            )
        if isinstance(node, ast.Attribute) and node.attr in ("name", "path", "suffix", "strerror", "kind"):
            # Of what? `error.strerror` says less than the owner's name.
            owner = _readable(node.value)
            if owner != "self":
                return owner if node.attr == "strerror" else f"{owner} {node.attr}"
        return _words(_name(node)) or "value"
    if isinstance(node, ast.Call):
        name, arguments = _name(node.func), node.args
        if name == "len" and arguments:
            return f"number of {_readable(arguments[0])}"
        if name in ("min", "max") and arguments:
            return f"{'smallest' if name == 'min' else 'largest'} of {_readable(arguments[0])}"
        if isinstance(node.func, ast.Attribute) and name != "join" and _name(node.func.value) != "self":
            return _readable(node.func.value)
        # getattr(options, name) and map(str, names) say it last.
        return _readable(arguments[-1]) if arguments else _words(name)
    if isinstance(node, ast.Subscript):
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            return _words(node.slice.value)
        return _readable(node.value)
    if isinstance(node, ast.BinOp):
        return _readable(node.right if isinstance(node.left, ast.Constant) else node.left)
    if isinstance(node, ast.BoolOp):
        return _readable(node.values[0])
    if isinstance(node, ast.IfExp):
        return _readable(node.body)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _readable(node.generators[0].iter)
    if isinstance(node, ast.Starred | ast.Await):
        return _readable(node.value)
    return "value"


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ").lower()


def wordings(node: ast.expr, root: Path, path: Path, depth: int = 0) -> list[str]:
    """Every text that an expression can be. What is not known before a run is a placeholder."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return _joined([wordings(part, root, path, depth) for part in node.values], node)
    if isinstance(node, ast.FormattedValue):
        return wordings(node.value, root, path, depth)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_text(node, root, path):
        return _joined([wordings(node.left, root, path, depth), wordings(node.right, root, path, depth)], node)
    if isinstance(node, ast.IfExp):
        return [*wordings(node.body, root, path, depth), *wordings(node.orelse, root, path, depth)]
    if isinstance(node, ast.Call) and _name(node.func) in ("str", "one_line") and len(node.args) == 1:
        return wordings(node.args[0], root, path, depth)
    if depth < 3 and isinstance(node, ast.Name | ast.Call):
        found = [
            text for made, where in _made_from(node, root, path) for text in wordings(made, root, where, depth + 1)
        ]
        if 0 < len(found) <= MOST_WORDINGS:
            return found
    return [placeholder(node)]


def _joined(parts: Sequence[Sequence[str]], whole: ast.expr) -> list[str]:
    number = 1
    for part in parts:
        number *= len(part)
    if number > MOST_WORDINGS:
        parts = [[part[0]] if len(part) == 1 else ["..."] for part in parts]
    return ["".join(pieces) for pieces in itertools.product(*parts)]


def _is_text(node: ast.AST, root: Path, path: Path) -> bool:
    """Whether an expression is written as text here, so that its words are known."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body, root, path) or _is_text(node.orelse, root, path)
    if isinstance(node, ast.BinOp):
        return _is_text(node.left, root, path) or _is_text(node.right, root, path)
    return isinstance(node, ast.JoinedStr)


def _made_from(node: ast.Name | ast.Call, root: Path, path: Path) -> list[tuple[ast.expr, Path]]:
    """The texts that a local name is set to or a function of ours returns, if all are texts."""
    if isinstance(node, ast.Call):
        found = _function(node.func, root, path)
        if found is None:
            return []
        function, where = found
        values = [one.value for one in _own(function) if isinstance(one, ast.Return) and one.value is not None]
        values = [value for value in values if not (isinstance(value, ast.Constant) and value.value is None)]
        return [(value, where) for value in values] if values and all(_is_text(v, root, where) for v in values) else []
    scope: ast.AST | None = node
    while scope is not None and not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
        scope = getattr(scope, "parent", None)
    if scope is None:
        return []
    set_to: list[ast.expr] = []
    for one in _own(scope):
        targets = one.targets if isinstance(one, ast.Assign) else [one.target] if isinstance(one, ast.NamedExpr) else []
        if isinstance(one, ast.Assign | ast.NamedExpr) and any(_name(target) == node.id for target in targets):
            set_to.append(one.value)
    if set_to and all(_is_text(value, root, path) for value in set_to):
        return [(value, path) for value in set_to]
    if len(set_to) == 1 and isinstance(set_to[0], ast.Call):
        return _made_from(set_to[0], root, path)
    return _constant(node.id, root, path) if not set_to else []


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function or module, without those of functions and classes in it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _own(child)


def _imported_from(name: str, root: Path, path: Path) -> Path | None:
    """The file of ours that a name is imported from."""
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fedbert_"):
            continue
        if any((alias.asname or alias.name) == name for alias in node.names):
            module = (node.module or "").replace("fedbert_kernels", "kernels").replace(".", "/")
            file = root / f"{module}.py"
            return file if file.is_file() else None
    return None


def _function(called: ast.expr, root: Path, path: Path) -> tuple[ast.FunctionDef, Path] | None:
    """The function or method of the same class that is called, where it can be told."""
    name = _name(called)
    if isinstance(called, ast.Attribute) and _name(called.value) not in ("self", "cls"):
        return None
    is_method = isinstance(called, ast.Attribute)
    where = path if is_method else _imported_from(name, root, path) or path
    nodes = ast.walk(tree_of(where)) if is_method else tree_of(where).body
    functions = [one for one in nodes if isinstance(one, ast.FunctionDef) and one.name == name]
    return (functions[0], where) if len(functions) == 1 else None


def _constant(name: str, root: Path, path: Path) -> list[tuple[ast.expr, Path]]:
    """A constant of this module, or of one of ours: its number or its text."""
    where = _imported_from(name, root, path) or path
    for one in tree_of(where).body:
        if isinstance(one, ast.Assign) and _name(one.targets[0]) == name and isinstance(one.value, ast.Constant):
            return [(one.value, where)]
    return []


# ------------------------------------------------------------------ entries


def entries(root: Path = ROOT) -> list[Entry]:
    """All rows of the page, sorted, each once."""
    codes = exit_codes(root)
    found = {one for path in sources(root) for one in _entries_of(path, root, codes)}
    for script in sorted((root / "launchers").rglob("*.sbatch")):
        for text in re.findall(r'\bfail "([^"]+)"', script.read_text(encoding="utf-8")):
            words = re.sub(r"\$\{?(\w+)[^\s;,:}/.]*\}?", lambda one: f"<{_words(one[1])}>", text)
            found.add(Entry("slurm", *split(words), "script", "1"))
    order = list(TITLES)
    return sorted(
        found,
        key=lambda one: (
            (order.index(one.section), "") if one.section in order else (len(order), one.section),
            re.sub(r"<[^>]*>|\W", "", one.said).lower(),
            one,
        ),
    )


def _entries_of(path: Path, root: Path, codes: dict[str, str]) -> Iterator[Entry]:
    here = path.relative_to(root).as_posix()
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind = _name(node.func)
        if kind == "ValueError" and here.startswith("fedbert_ds/config"):
            code = codes["ConfigError"]
        elif kind == "warn" and isinstance(node.func, ast.Name):
            code = ""
        elif kind in codes:
            code = codes[kind]
        else:
            continue
        for text in wordings(node.args[0], root, path):
            text = " ".join(text.split())
            # Passed on: its words are another call's.
            if re.search(r"[a-z]{2}", re.sub(r"<[^>]*>", "", text)):
                said, remedy = split(text)
                if not remedy and _passes_on(node, text, codes):
                    remedy = "do what it says"
                yield Entry(section_of(here), said, remedy, kind, code)


def _passes_on(call: ast.Call, text: str, codes: dict[str, str]) -> bool:
    """Whether a text ends with that of another error: one that is caught here, or that came from
    the other side."""
    if text.endswith((": <details>", ": <reason>", ": <found>")):
        return True
    above: ast.AST | None = call
    while above is not None and not isinstance(above, ast.ExceptHandler):
        above = getattr(above, "parent", None)
    return above is not None and _name(above.type or call) in codes and text.endswith(f": <{above.name}>")


def section_of(file: str) -> str:
    fitting = [place for place in ROOMS if file == place or file.startswith(f"{place}/")]
    return ROOMS[max(fitting, key=len)] if fitting else Path(file).parts[1].removesuffix(".py")


def split(text: str) -> tuple[str, str]:
    """What happened, and what to do about it ("" if the text does not say)."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "(<") - (sign in ")>")
        if sign == ";" and depth <= 0 and text[place + 1 : place + 2] == " ":
            return text[:place], text[place + 2 :]
    if look := re.fullmatch(r"(.*) \((see [^)]*)\)", text):
        return look[1], look[2]
    # `run.windows: a whole number, not 'many'` says itself what belongs there.
    if wanted := re.fullmatch(r"(.*): ([^:]+), not ([^:]+)", text):
        return f"{wanted[1]}: not {wanted[3]}", f"give {wanted[2]}"
    asked = list(ASKS.finditer(text))
    return (text[: asked[-1].start()], text[asked[-1].end() :]) if asked else (text, "")


def is_breach(entry: Entry, codes: dict[str, str]) -> bool:
    """Whether it says that the other side broke the protocol: nothing that a user set is wrong."""
    return not entry.remedy and bool(entry.code) and entry.code == codes["WireError"]


# ------------------------------------------------------------------ the page

LEAD = f"""# Errors

Every error that a user can mend is one line: what is wrong and, behind it, what to change. This
page lists all of them. Search it for a few words of the line you have. What is *slanted* stands for
a name, a number or a path. A traceback is a bug of FedBERT-DS: report it with its last lines.

The page is made from the code by `{COMMAND}`, and a test fails when the two differ.
Whoever changes a message runs that command and commits the page with it. Two changes that meet in
the page are resolved the same way. An error without a remedy behind a semicolon fails that test,
too.

Lines of errors begin with `fedbert-ds:` on standard error, lines that begin with `warning` tell of
something that work goes on without. Wrong options (`--no-such-option`) are told by the command's
own help. A check of a part of the run file stands behind the file's name and the key:
`configs/mine.yaml: body: fp8 is for precision: bf16; set that, or fp8: false`.

| exit code | what it says |
| --- | --- |
"""

BREACH = """## Broken protocol

One side sent what the protocol does not have. No setting of yours is wrong. The server drops a
client for it and goes on with the others; a client leaves the run. What to do for all of them:
install the same fedbert-ds on both sides and start the client again. If the line comes again, the
other program is changed or faulty: its owner must look at it, and [security.md](security.md) says
what it can reach until then.

| what is said |
| --- |
"""


def page(root: Path = ROOT) -> str:
    """The whole page."""
    codes = exit_codes(root)
    lines = [LEAD]
    for node in tree_of(root / "fedbert_ds" / "errors.py").body:
        # A kind of one of these has its code.
        if isinstance(node, ast.ClassDef) and "UserError" in map(_name, node.bases):
            lines.append(f"| {codes[node.name]} | {(ast.get_docstring(node) or '').splitlines()[0]} |\n")
    lines.append("| 130 | Ctrl-C ended it. |\n")
    section, breaches = "", []
    for entry in entries(root):
        if is_breach(entry, codes):
            breaches.append(entry)
            continue
        if entry.section != section:
            section = entry.section
            title = TITLES.get(section, section.replace("_", " ").capitalize())
            lines.append(f"\n## {title}\n\n| what is said | what to do | exit code |\n| --- | --- | --- |\n")
        lines.append(f"| {_cell(entry.said)} | {_cell(entry.remedy)} | {entry.code or 'warning'} |\n")
    lines.append(f"\n{BREACH}")
    lines.extend(f"| {said} |\n" for said in sorted({_cell(entry.said) for entry in breaches}))
    return "".join(lines)


def _cell(text: str) -> str:
    """The text in a table's cell: nothing of it is markup."""
    escaped = re.sub(r"([|*\[\]\\])", r"\\\1", text.replace("`", "'"))
    return re.sub(r"<([^<>]*)>", r"*\1*", escaped)


def without_remedy(root: Path = ROOT) -> list[str]:
    """Errors that say what is wrong, and not what to change."""
    codes = exit_codes(root)
    found = [one for one in entries(root) if not one.remedy and not is_breach(one, codes)]
    return [f'{one.kind}("{one.said}") says not what to change: add it behind a semicolon' for one in found]


def problems(root: Path = ROOT) -> list[str]:
    """What a change of the code must mend: errors without a remedy, and a page that differs."""
    there = (root / PAGE).read_text(encoding="utf-8") if (root / PAGE).is_file() else ""
    return [*without_remedy(root), *([] if there == page(root) else [f"{PAGE} is not of this code; run: {COMMAND}"])]


def main(arguments: Sequence[str]) -> int:
    if "--check" not in arguments:
        (ROOT / PAGE).write_text(page(), encoding="utf-8")
    for problem in (found := problems()):
        print(f"errors  {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
