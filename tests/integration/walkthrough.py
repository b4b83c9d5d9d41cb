"""Three owners of French notes and a server, each in a network namespace, as a new user would.

Writes docs/walkthrough.md: what is typed where, and what is answered. Needs root, `ip` and Debian's
package index, where the notes come from.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.domains.__main__ import unpack
from benchmarks.domains.packages import pages

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "debian-reference-fr"
NETWORK = "10.77.0."
SERVER = "body.example"
MACHINES = {"body": 1, "nord": 11, "est": 12, "sud": 13}
"""Names and the last part of their addresses."""
SHORTEST_LINE = 40
"""Characters; shorter lines are headings."""
LINES_PER_NOTE = 6
TIMEOUT = 1200.0
INTRODUCTION = """\
# A first run, typed

You get here: every line that four parties typed for a run over TLS, and what they were answered.

Three owners have French notes: `nord` a table from a spreadsheet, `est` one from a warehouse, `sud`
letters in one file with blank lines between them. `body` is the server. Each is a machine of its
own in a network of four (network namespaces of one Linux machine with 2 cores and no GPU). The run
continues `french`, a CamemBERT of 2 layers and width 128 with a French vocabulary of 4,000 pieces
and weights that are still random: no hub could be reached. In its place `model: {checkpoint:
camembert-base}` names the real one.

In the middle `est` is killed with kill -9 and started again with the same line. `python
tests/integration/walkthrough.py --out docs/walkthrough.md` types all of this anew and writes this
page; the notes are passages of Debian's French reference.
"""

_LAUNCHER = re.compile(r"^\[(W\d|\d{4}-)")
"""Lines of DeepSpeed's launcher and torch."""


@dataclass
class Machine:
    """A namespace with a folder of its own, where commands are typed."""

    name: str
    folder: Path
    told: list[str]
    """The transcript, of all machines."""
    running: list[tuple[subprocess.Popen[bytes], Path]] = field(default_factory=list)

    def type(self, command: str, expected: int = 0, most_lines: int = 40) -> str:
        """Run a command to its end; what it printed."""
        done = subprocess.run(
            self._arguments(command), cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT
        )
        output = done.stdout.decode()
        self._tell(command, output, most_lines)
        assert done.returncode == expected, f"{self.name}$ {command} ended with {done.returncode}\n{output}"
        return output

    def begin(self, command: str) -> None:
        """Start a command that goes on beside others."""
        log = self.folder / f"log-{len(self.running)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._arguments(command), cwd=self.folder, stdout=output, stderr=output, start_new_session=True
            )
        self.running.append((process, log))
        self._tell(f"{command} &", "", 0)

    def wait_for(self, words: str) -> None:
        """Until the latest command has said this. AssertionError if it ends without."""
        process, log = self.running[-1]
        deadline = time.monotonic() + TIMEOUT
        while words not in log.read_text("utf-8", "replace"):
            assert process.poll() is None and time.monotonic() < deadline, f"{self.name}\n{log.read_text()}"
            time.sleep(0.2)

    def kill(self) -> None:
        """End the latest command as by kill -9."""
        process, log = self.running[-1]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT)
        self._tell("kill -9 %1", log.read_text("utf-8", "replace"), 12)

    def finish(self, most_lines: int) -> None:
        """Wait for the latest command to end well, and tell what it printed."""
        process, log = self.running[-1]
        code = process.wait(TIMEOUT)
        output = log.read_text("utf-8", "replace")
        assert code == 0, f"{self.name} ended with {code}\n{output}"
        self._tell("wait", output, most_lines)

    def stop(self) -> None:
        """End what is left."""
        for process, _ in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _arguments(self, command: str) -> list[str]:
        return ["ip", "netns", "exec", namespace(self.name), "bash", "-c", command]

    def _tell(self, command: str, output: str, most_lines: int) -> None:
        lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip() and not _LAUNCHER.match(line)]
        if len(lines) > most_lines > 0:
            lines = [*lines[: most_lines // 2], "...", *lines[-(most_lines - most_lines // 2) :]]
        self.told.append("\n".join([f"{self.name}$ {command}", *(lines if most_lines else [])]))


def namespace(name: str) -> str:
    """The namespace of a machine."""
    return f"fedbert-{name}"


@contextmanager
def connected(names: Sequence[str]) -> Iterator[None]:
    """Namespaces with these names, on one network, that know the server's name."""

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True, capture_output=True)

    with ExitStack() as undo:
        run("ip netns add fedbert-net")
        undo.callback(run, "ip netns del fedbert-net")
        run("ip -n fedbert-net link add bridge0 type bridge")
        run("ip -n fedbert-net link set bridge0 up")
        for name in names:
            there = namespace(name)
            run(f"ip netns add {there}")
            undo.callback(run, f"ip netns del {there}")
            run(f"ip -n {there} link add eth0 type veth peer name {name} netns fedbert-net")
            run(f"ip -n fedbert-net link set {name} master bridge0 up")
            run(f"ip -n {there} addr add {NETWORK}{MACHINES[name]}/24 dev eth0")
            run(f"ip -n {there} link set eth0 up")
            run(f"ip -n {there} link set lo up")
            # `ip netns exec` shows these files in place of the machine's own.
            own = Path("/etc/netns") / there
            own.mkdir(parents=True)
            undo.callback(shutil.rmtree, own)
            (own / "hosts").write_text(f"127.0.0.1 localhost\n{NETWORK}{MACHINES['body']} {SERVER}\n")
        yield


def notes() -> list[str]:
    """Passages of the French Debian reference."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(PACKAGE, Path(folder))
        texts = [text for _, text in pages("usr/share/debian-reference", "*.fr.html", Path(folder))]
    lines = [line for text in texts for line in text.splitlines() if len(line) >= SHORTEST_LINE]
    return [" ".join(lines[start : start + LINES_PER_NOTE]) for start in range(0, len(lines), LINES_PER_NOTE)]


def write_notes(folders: dict[str, Path], texts: Sequence[str]) -> None:
    """Three exports of three shapes, and text that nobody trains on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    held, third = texts[::20], [[text for n, text in enumerate(texts) if n % 20 and n % 3 == part] for part in range(3)]
    with (folders["nord"] / "export.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["id", "service", "note"])
        rows.writerows([number, "cardiologie", text] for number, text in enumerate(third[0]))
    table = pa.table({"dossier": range(len(third[1])), "compte_rendu": third[1]})
    pq.write_table(table, folders["est"] / "export.parquet")
    (folders["sud"] / "lettres.txt").write_text("\n\n".join(third[2]), "utf-8")
    (folders["body"] / "public.txt").write_text("\n\n".join(held), "utf-8")


def write_checkpoint(folder: Path, texts: Sequence[str]) -> None:
    """A small CamemBERT with a French tokenizer, in place of a hub's."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.decoders import Metaspace as MetaspaceDecoder
    from tokenizers.models import Unigram
    from tokenizers.normalizers import NFKC
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.trainers import UnigramTrainer
    from transformers import CamembertConfig, CamembertForMaskedLM, PreTrainedTokenizerFast

    tokens = Tokenizer(Unigram())
    tokens.normalizer, tokens.pre_tokenizer, tokens.decoder = NFKC(), Metaspace(), MetaspaceDecoder()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = UnigramTrainer(vocab_size=4000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokens.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    config = CamembertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=66, type_vocab_size=1, initializer_range=0.06,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    CamembertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


RUN_FILE = """\
run: {directory: runs/notes, windows: 150, save_every: 50, evaluate_every: 50}
model: {checkpoint: french}
data: {client_held_out: 0.05, sequence_length: 64}
window: {tokens: 4096, tokens_per_micro_batch: 1024}
optimizer: {lr: 2.0e-3, warmup_windows: 20}
clients: {expected: 3, local: 0}
server:
  host: 0.0.0.0
  advertise: body.example
  tls: {ca: certs/ca.pem, certificate: certs/body.example.pem, key: certs/body.example.key}
"""

CLIENTS = {
    "nord": "--data export.csv --text-columns note",
    "est": "--data export.parquet --text-columns compte_rendu",
    "sud": "--data lettres.txt",
}
"""What each owner has: a table from a spreadsheet, one of a warehouse, a file of letters."""


def walk(folders: Mapping[str, Path]) -> list[str]:
    """What the four parties type, one after another, with the answers."""
    told: list[str] = []
    machines = {name: Machine(name, folders[name], told) for name in MACHINES}
    body = machines["body"]
    with connected(list(MACHINES)), ExitStack() as undo:
        for machine in machines.values():
            undo.callback(machine.stop)
        body.type("fedbert-ds certs ca")
        body.type(f"fedbert-ds certs server {SERVER}")
        for client in CLIENTS:
            body.type(f"fedbert-ds certs client {client}")
            for name in ("ca.pem", f"{client}.pem", f"{client}.key"):
                shutil.copy(folders["body"] / "certs" / name, folders[client] / name)
        body.type("cat notes.yaml")
        body.type("fedbert-ds doctor notes.yaml")
        for client in CLIENTS:
            machines[client].type(f"fedbert-ds doctor {_options(client)}", expected=1)
        body.begin("deepspeed --num_gpus 1 launchers/pretrain.py --config notes.yaml")
        body.wait_for("clients waiting for 3")
        for client in CLIENTS:
            machines[client].type(f"fedbert-ds doctor {_options(client)}")
        for client in CLIENTS:
            machines[client].begin(f"fedbert-ds client {_options(client)}")
        body.wait_for("window 50/150  held out")
        machines["est"].kill()
        body.wait_for("est disconnected")
        machines["est"].begin(f"fedbert-ds client {_options('est')}")
        for client in CLIENTS:
            machines[client].finish(most_lines=20)
        body.finish(most_lines=40)
        body.type("fedbert-ds eval --model french --data public.txt")
        body.type("fedbert-ds eval --model runs/notes/hf --data public.txt")
    return told


def _options(client: str) -> str:
    return f"--server {SERVER}:29600 {CLIENTS[client]} --ca ca.pem --certificate {client}.pem --key {client}.key"


def main() -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: to standard output)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in MACHINES}
        for folder in folders.values():
            folder.mkdir()
        (folders["body"] / "launchers").symlink_to(ROOT / "launchers")
        (folders["body"] / "notes.yaml").write_text(RUN_FILE, "utf-8")
        texts = notes()
        write_notes(folders, texts)
        write_checkpoint(folders["body"] / "french", texts)
        transcript = "\n\n".join(walk(folders)).replace(f"{place}/", "/home/")
    page = f"{INTRODUCTION}\n```\n{transcript}\n```\n"
    if options.out is None:
        print(page)
    else:
        options.out.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
