"""Small files in the exact form of GLUE's originals, for every task."""

from __future__ import annotations

from pathlib import Path

TRAIN = {
    "CoLA": "gj04\t1\t\tOur friends won't buy this \"analysis.\ngj04\t0\t*\tThey drank the pub dry of.\n",
    "SST-2": "sentence\tlabel\nhide new secretions \t0\nso good\t1\n",
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t702876\t702977\tAmrozi "accused" him .\tReferring to him "\r\n0\t1\t2\tTwo\tThree\r\n',
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
    "1\tmain\tMSRvid\t2012\t0004\tnone\tnone\tA man.\tA flute.\t0\n",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\tWhy?\t0\n"
    "cut short\n2\t4\t5\tHow are you?\tHow do you do?\t1\n",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    "0\t1\t1n\tfiction\tb\tb\tp\tp\tHe sat.\tHe stood.\tneutral\tcontradiction\n"
    "1\t1\t1e\tfiction\tb\tb\tp\tp\tHe ran.\tHe moved.\tentailment\tentailment\n",
    "QNLI": "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn 1815.\tentailment\n1\tWho?\tRain.\tnot_entailment\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n"
    "1\tA\u2028b.\tB.\tnot_entailment\n",
}
EXPECTED = {
    "CoLA": [(("Our friends won't buy this \"analysis.",), 1), (("They drank the pub dry of.",), 0)],
    "SST-2": [(("hide new secretions ",), 0), (("so good",), 1)],
    "MRPC": [(('Amrozi "accused" him .', 'Referring to him "'), 1), (("Two", "Three"), 0)],
    "STS-B": [(("A plane.", "An air plane."), 5.0), (("A man.", "A flute."), 0.0)],
    "QQP": [(("How?", "Why?"), 0), (("How are you?", "How do you do?"), 1)],
    "MNLI": [(("He sat.", "He stood."), 2), (("He ran.", "He moved."), 0)],
    "QNLI": [(("When?", "In 1815."), 0), (("Who?", "Rain."), 1)],
    "RTE": [(("It rains.", "It is wet."), 0), (("A\u2028b.", "B."), 1)],
}
"""Texts and label of each row of TRAIN."""
MNLI_DEV = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
    "0\t1\t1n\tslate\tb\tb\tp\tp\tYes.\tNo.\tneutral\tneutral\tneutral\tneutral\tneutral\tneutral\n"
)
TEST = {
    "CoLA": "index\tsentence\n0\tBill whistled past the house.\n",
    "SST-2": "index\tsentence\n0\tuneasy mishmash\n1\tgood\n",
    "MRPC": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tOne\tTwo\n",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
    "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\tA girl.\tA woman.\n",
    "QQP": "id\tquestion1\tquestion2\n0\tWould it?\tCould it?\n",
    "QNLI": "index\tquestion\tsentence\n0\tWhat?\tThat.\n",
    "RTE": "index\tsentence1\tsentence2\n0\tCows.\tAnimals.\n",
}
MNLI_TEST = "\t".join(MNLI_DEV.split("\t")[:10]) + "\n31\t1\t1\tslate\tb\tb\tp\tp\tYes.\tNo.\n"


def write_glue(folder: Path, *tasks: str, test: bool = False) -> Path:
    """`folder`/TASK/*.tsv; the dev set is the training set, but for MNLI."""
    for task in tasks:
        here = folder / task
        here.mkdir(parents=True, exist_ok=True)
        files = {"train": TRAIN[task]}
        if task == "MNLI":
            files |= {"dev_matched": MNLI_DEV, "dev_mismatched": MNLI_DEV.replace("slate", "verbatim")}
            files |= {"test_matched": MNLI_TEST, "test_mismatched": MNLI_TEST} if test else {}
        else:
            files |= {"dev": TRAIN[task]} | ({"test": TEST[task]} if test else {})
        for name, text in files.items():
            (here / f"{name}.tsv").write_bytes(text.encode())
    return folder
