"""Original files and the hub give the same examples; what is wrong with them is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.tasks.glue_files import EXPECTED, TEST, TRAIN, write_glue

from fedbert_ds.errors import DataError
from fedbert_ds.tasks.glue_data import HUB_DATA_SET, LabelledText, read_task, read_tsv
from fedbert_ds.tasks.glue_tasks import GLUE


@pytest.mark.parametrize("name", GLUE)
def test_original_files(tmp_path: Path, name: str) -> None:
    """Quotes mean nothing, a byte order mark and carriage returns are no text, CoLA has no header,
    only a newline ends a row, a damaged row of QQP is left out."""
    data = read_task(GLUE[name], write_glue(tmp_path, name))
    assert data.train == [LabelledText(texts, label) for texts, label in EXPECTED[name]]
    assert list(data.dev) == list(GLUE[name].dev_splits)
    if name == "MNLI":
        assert data.dev["dev_mismatched"] == [LabelledText(("Yes.", "No."), 1)]
    else:
        assert data.dev["dev"] == data.train
    assert data.test == {}


@pytest.mark.parametrize("name", GLUE)
def test_test_files_have_no_labels(tmp_path: Path, name: str) -> None:
    data = read_task(GLUE[name], write_glue(tmp_path, name, test=True))
    assert list(data.test) == list(GLUE[name].splits("test"))
    for examples in data.test.values():
        assert examples and all(one.label is None and len(one.texts) == len(GLUE[name].sentences) for one in examples)
    if name == "MRPC":
        assert data.test["test"] == [LabelledText(("One", "Two"), None)]
    if name == "MNLI":
        assert data.test["test_mismatched"] == [LabelledText(("Yes.", "No."), None)]


@pytest.mark.parametrize("name", GLUE)
def test_the_hub_gives_the_same_examples(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    task = GLUE[name]
    files = read_task(task, write_glue(tmp_path, name, test=True))

    def rows(examples, labelled=True):
        columns = {
            column: [one.texts[place] for one in examples] for place, column in enumerate(task.hub_sentences)
        } | {"label": [one.label if labelled else -1 for one in examples], "idx": list(range(len(examples)))}
        return datasets.Dataset.from_dict(columns)

    def load(data_set, configuration):
        assert (data_set, configuration) == (HUB_DATA_SET, task.hub_name)
        splits = {"train": rows(files.train)}
        splits |= {split.replace("dev", "validation"): rows(examples) for split, examples in files.dev.items()}
        return datasets.DatasetDict(splits | {split: rows(one, labelled=False) for split, one in files.test.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = read_task(task, None)
    assert (hub.train, hub.dev, hub.test) == (files.train, files.dev, files.test)
    assert hub.digest == files.digest


def test_the_digest_sees_texts_labels_and_order(tmp_path: Path) -> None:
    write_glue(tmp_path, "SST-2")
    first = read_task(GLUE["SST-2"], tmp_path).digest
    digests = {first}
    for text in (
        TRAIN["SST-2"].replace("good", "bad"),
        TRAIN["SST-2"].replace("good\t1", "good\t0"),
        "sentence\tlabel\nso good\t1\nhide new secretions \t0\n",
    ):
        (tmp_path / "SST-2" / "train.tsv").write_text(text)
        digests.add(read_task(GLUE["SST-2"], tmp_path).digest)
    assert len(digests) == 4
    write_glue(tmp_path, "SST-2", test=True)
    assert read_task(GLUE["SST-2"], tmp_path).digest == first


def refused(task: str, path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_tsv(GLUE[task], path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "task, change, says",
    [
        ("RTE", ("sentence2", "text2"), "no column 'sentence2' (columns: index, sentence1, text2, label)"),
        ("MRPC", ("Quality", "label"), "no column 'Quality'"),
        ("RTE", ("not_entailment", "no"), "line 3: label 'no' is none of RTE's; use entailment, not_entailment"),
        ("SST-2", ("good\t1", "good\t2"), "line 3: label '2' is none of SST-2's; use 0, 1"),
        ("CoLA", ("gj04\t0", "gj04\t-1"), "line 2: label '-1' is none of CoLA's"),
        ("MNLI", ("contradiction", "-"), "line 2: label '-' is none of MNLI's"),
        ("STS-B", ("5.000", "5.1"), "line 2: label '5.1' is none of STS-B's; use numbers from 0 to 5"),
        ("STS-B", ("5.000", "nan"), "label 'nan' is none of STS-B's"),
        ("STS-B", ("5.000", "high"), "label 'high' is none of STS-B's"),
        ("RTE", ("\tB.\t", " "), "line 3 has 2 fields, 4 are needed"),
        ("CoLA", ("\t0\t*\t", " "), "line 2 has 1 fields, 4 are needed"),
        ("QQP", ("\t0\n", "\tmaybe\n"), "line 2: label 'maybe'"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, task: str, change: tuple[str, str], says: str) -> None:
    write_glue(tmp_path, task)
    path = tmp_path / task / "train.tsv"
    text = path.read_text(encoding="utf-8")
    assert text.replace(*change) != text
    path.write_text(text.replace(*change), encoding="utf-8")
    message = refused(task, path)
    assert says in message and "train.tsv" in message


def test_missing_and_empty_files(tmp_path: Path) -> None:
    write_glue(tmp_path, "RTE", "MNLI")
    with pytest.raises(DataError, match="no-folder: no such folder; --data"):
        read_task(GLUE["RTE"], tmp_path / "no-folder")
    with pytest.raises(DataError, match=r"STS-B/train.tsv: no such file; .* leave STS-B out"):
        read_task(GLUE["STS-B"], tmp_path)
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(DataError, match=r"MNLI/dev_mismatched.tsv: no such file"):
        read_task(GLUE["MNLI"], tmp_path)
    (tmp_path / "RTE" / "train.tsv").write_text(TRAIN["RTE"].partition("\n")[0] + "\n")
    assert "holds no examples" in refused("RTE", tmp_path / "RTE" / "train.tsv")
    (tmp_path / "RTE" / "train.tsv").write_text("")
    assert "no column 'sentence1'" in refused("RTE", tmp_path / "RTE" / "train.tsv")
    (tmp_path / "RTE" / "train.tsv").write_bytes(b"\xff\xfe\x00")
    assert "\n" not in refused("RTE", tmp_path / "RTE" / "train.tsv")


def test_a_test_split_alone_of_two_is_not_read(tmp_path: Path) -> None:
    write_glue(tmp_path, "MNLI", test=True)
    (tmp_path / "MNLI" / "test_mismatched.tsv").unlink()
    assert read_task(GLUE["MNLI"], tmp_path).test == {}


def test_wrong_columns_of_a_test_file_are_one_line(tmp_path: Path) -> None:
    write_glue(tmp_path, "SST-2", test=True)
    (tmp_path / "SST-2" / "test.tsv").write_text(TEST["SST-2"].replace("sentence", "text"))
    with pytest.raises(DataError, match="no column 'sentence'"):
        read_task(GLUE["SST-2"], tmp_path)


def test_a_hub_out_of_reach_and_foreign_rows_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fails(*names):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=r"hub:nyu-mll/glue:rte: cannot load it: no route; or name --data"):
        read_task(GLUE["RTE"], None)

    def set_of(**columns):
        split = datasets.Dataset.from_dict(columns)
        return lambda *names: datasets.DatasetDict(train=split, validation=split, test=split)

    monkeypatch.setattr(datasets, "load_dataset", set_of(text=["a"], label=[0]))
    with pytest.raises(DataError, match="no column 'sentence1'"):
        read_task(GLUE["RTE"], None)
    monkeypatch.setattr(datasets, "load_dataset", set_of(sentence1=["a"], sentence2=["b"], label=[2]))
    with pytest.raises(DataError, match="row 0: label 2 is none of RTE's"):
        read_task(GLUE["RTE"], None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict())
    with pytest.raises(DataError, match="train: no such split"):
        read_task(GLUE["RTE"], None)
