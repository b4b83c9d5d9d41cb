"""A record says what ran where, names no host and no user, and stays readable line by line."""

import json
import subprocess
import sys

from fedbert_ds.telemetry import record


def test_record_is_json_with_one_row_a_line(tmp_path):
    path = tmp_path / "results" / "some.json"
    rows = [{"window": number, "loss": 6.5 - number} for number in range(3)]
    written = record.write_record(path, command="fedbert-ds bench some", commit="abc", rows=rows, settings={"a": [1]})
    text = path.read_text()
    assert json.loads(text) == written
    assert list(written) == ["command", "commit", "machine", "versions", "settings", "rows"]
    assert '    {"window": 1, "loss": 5.5},\n' in text
    assert [file.name for file in path.parent.iterdir()] == ["some.json"]


def test_no_rows(tmp_path):
    record.write_record(tmp_path / "some.json", command="x", commit=None, rows=[])
    assert json.loads((tmp_path / "some.json").read_text())["rows"] == []


def test_machine_and_versions():
    machine, versions = record.machine(), record.versions()
    assert set(machine) == {"cpu", "cores", "memory_gb", "system"}
    assert machine["cores"] >= 1
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] and versions["transformers"] and versions["fedbert-ds"]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(record, "PACKAGES", ("no-such-package-anywhere",))
    assert record.versions()["no-such-package-anywhere"] is None


def test_commit_of_a_checkout_and_of_a_plain_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SOURCE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.source_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("one")
    recorded = tmp_path / record.RECORDS / "one.json"
    recorded.parent.mkdir(parents=True)
    recorded.write_text("{}")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True, timeout=30)
    commit = record.source_commit()
    assert commit is not None and len(commit) == 40
    (tmp_path / "untracked").write_text("two")
    assert record.source_commit() == commit
    recorded.write_text('{"rows": []}')
    assert record.source_commit() == commit, "a record that gets another row is no other source"
    (tmp_path / "file").write_text("two")
    assert record.source_commit() == f"{commit}-dirty"


def test_command_line_is_what_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/fedbert-ds", "bench", "modes", "--data", "a file.tokens"])
    assert record.command_line() == "fedbert-ds bench modes --data 'a file.tokens'"
