"""Words are aligned left, numbers right."""

from fedbert_ds.telemetry.tables import markdown


def test_a_table() -> None:
    assert markdown(["system", "link", "tokens/s"], [["ours", "0 ms", "2,547"], ["naive", "", "9"]], words=2) == (
        "| system | link | tokens/s |\n"
        "| --- | --- | --: |\n"
        "| ours | 0 ms | 2,547 |\n"
        "| naive |  | 9 |"
    )  # fmt: skip
