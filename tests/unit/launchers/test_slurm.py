"""The SLURM scripts without a cluster: what they run and refuse, and shellcheck's verdict."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "launchers" / "slurm"
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

# A stand-in for scontrol: the first of two nodes.
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames gpu[01-02]" ] && printf "gpu01\\ngpu02\\n"\n'


def run(script, *arguments, cwd=ROOT, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    for name in ("MASTER_ADDR", "MASTER_PORT", "CONFIG", "RUN_DIR", "SERVER", "PYTHON"):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.fixture
def submitted(tmp_path):
    """A folder to submit from, and a path on which scontrol knows two nodes."""
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers" / "pretrain.py").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.yaml").touch()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    return {
        "cwd": tmp_path,
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "DRY_RUN": "1",
        "SLURM_JOB_ID": "123",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu[01-02]",
        "SLURM_GPUS_ON_NODE": "8",
    }


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["pretrain.sbatch", "client.sbatch", "../../.ci/run", "../../.ci/audit"])
def test_shellcheck_has_nothing_to_say(script):
    result = subprocess.run([str(SHELLCHECK), str(SCRIPTS / script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_server_without_a_cluster():
    result = run("pretrain.sbatch", "run.windows=50", DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    assert "ranks     1 on 1 node(s)" in result.stdout
    assert "launchers/pretrain.py --config configs/default.yaml run.directory=runs/slurm-JOB" in result.stdout
    assert result.stdout.splitlines()[1].endswith("run.windows=50")


def test_server_on_two_nodes_has_a_rank_for_each_gpu(submitted):
    result = run("pretrain.sbatch", **submitted)
    assert result.returncode == 0, result.stderr
    assert "ranks     16 on 2 node(s), meeting at gpu01:20123" in result.stdout
    assert "srun --nodes=2 --ntasks=16 --ntasks-per-node=8" in result.stdout
    assert "run.directory=runs/slurm-123" in result.stdout
    assert "--resume" not in result.stdout


def test_server_resumes_a_run_that_has_begun(submitted):
    folder = submitted["cwd"] / "runs" / "slurm-123"
    folder.mkdir(parents=True)
    assert "--resume" not in run("pretrain.sbatch", **submitted).stdout
    (folder / "config.yaml").touch()
    assert "--resume" in run("pretrain.sbatch", **submitted).stdout


@pytest.mark.parametrize(
    ("ends", "is_left"),
    [("exit 0", True), ("touch $STOPPED", False), ("exit 1", False)],
    ids=["complete", "stopped", "failed"],
)
def test_only_a_complete_run_leaves_word_for_its_clients(submitted, ends, is_left):
    """An address would be that of a server that is gone."""
    address = submitted["cwd"] / "runs" / "slurm-123" / "server.address"
    address.parent.mkdir(parents=True)
    srun = submitted["cwd"] / "bin" / "srun"
    srun.write_text(f"#!/bin/sh\necho complete > {address}\n{ends}\n")
    srun.chmod(0o755)
    result = run("pretrain.sbatch", **submitted | {"DRY_RUN": "", "PYTHON": sys.executable})
    assert result.returncode == {"exit 0": 0, "touch $STOPPED": 130, "exit 1": 1}[ends], result.stderr
    assert address.exists() == is_left


@pytest.mark.parametrize(("restarts", "is_queued"), [("", True), ("4", True), ("5", False)])
def test_a_job_that_lost_a_rank_is_queued_again_but_not_for_ever(submitted, restarts, is_queued):
    """The rank that was frozen is killed with its step, whose code is then 137."""
    run_folder, said = submitted["cwd"] / "runs" / "slurm-123", submitted["cwd"] / "said"
    run_folder.mkdir(parents=True)
    (run_folder / "lost").touch()  # by the try before
    srun, scontrol = (submitted["cwd"] / "bin" / name for name in ("srun", "scontrol"))
    ends = "RANK=1; export RANK; bash -c 'exit 75'; status=$?; [ $status != 75 ] || touch \"$LOST\"; exit 137"
    srun.write_text(f'#!/bin/sh\n[ ! -e "$LOST" ] || exit 3\n{ends}\n')
    srun.chmod(0o755)
    scontrol.write_text(f'{SCONTROL}[ "$1" != requeue ] || echo "$*" > {said}\n')
    variables = {"DRY_RUN": "", "PYTHON": sys.executable} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    result = run("pretrain.sbatch", **submitted | variables)
    assert result.returncode == 137, result.stderr
    assert said.exists() == is_queued and (not is_queued or said.read_text() == "requeue 123\n")
    assert ("queued again, to go on" in result.stdout) == is_queued
    assert ("after 5 times in the queue: look at the nodes" in result.stderr) != is_queued


@pytest.mark.parametrize(
    ("code", "mark"), [(75, "lost"), (137, "lost"), (139, "lost"), (143, None), (130, "stopped"), (1, None), (0, None)]
)
def test_a_rank_s_shell_leaves_word_of_how_it_ended(submitted, code, mark):
    """What srun runs for each rank, as it stands in the script."""
    folder = submitted["cwd"] / "runs" / "slurm-123"
    folder.mkdir(parents=True)
    python = submitted["cwd"] / "python"
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    srun = submitted["cwd"] / "bin" / "srun"
    srun.write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 "$@"\n'
    )
    for program in (python, srun):
        program.chmod(0o755)
    result = run("pretrain.sbatch", **submitted | {"DRY_RUN": "", "PYTHON": str(python), "SLURM_RESTART_COUNT": "9"})
    assert [name for name in ("lost", "stopped") if (folder / name).exists()] == ([mark] if mark else []), result.stderr
    assert result.returncode == (130 if code == 130 else code)


def test_server_outside_a_job_or_the_repository_is_one_line(tmp_path):
    outside_job = run("pretrain.sbatch")
    assert outside_job.returncode == 1
    assert (
        outside_job.stderr
        == "pretrain.sbatch: not inside a SLURM job; use sbatch, or DRY_RUN=1 to see what would run\n"
    )
    elsewhere = run("pretrain.sbatch", cwd=tmp_path, DRY_RUN="1")
    assert elsewhere.returncode == 1
    assert elsewhere.stderr.count("\n") == 1
    assert "submit from the repository's folder" in elsewhere.stderr


def test_client_takes_the_shard_of_its_number():
    result = run("client.sbatch", "--device", "cpu", DRY_RUN="1", SERVER="gpu01:29600", SLURM_ARRAY_TASK_ID="3")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "command   .venv/bin/fedbert-ds client --server gpu01:29600 --data shards/shard-3.jsonl --id client-3 "
        "--state runs/clients/client-3 --connect-timeout 600 --rejoin-timeout 86400 --device cpu\n"
    )


def test_client_is_told_where_the_server_writes_its_address(tmp_path):
    """It looks there each time it joins: a requeued server may be on another node."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-0.jsonl").touch()
    program = tmp_path / "fedbert-ds"
    program.write_text('#!/bin/sh\necho "ran $*"\n')
    program.chmod(0o755)
    result = run("client.sbatch", cwd=tmp_path, RUN_DIR="run", FEDBERT_DS="./fedbert-ds")
    assert result.returncode == 0, result.stderr
    assert "ran client --server run/server.address --data shards/shard-0.jsonl --id client-0" in result.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set SERVER=host:port, or RUN_DIR"),
        ({"SERVER": "gpu01:1", "FEDBERT_DS": "./none"}, "./none: no such command"),
        ({"SERVER": "gpu01:1", "FEDBERT_DS": "/bin/true", "DATA_DIR": "none"}, "none/shard-0.jsonl: no such shard"),
    ],
)
def test_client_says_what_is_missing_in_one_line(variables, message):
    result = run("client.sbatch", **variables)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_certificates_are_one_variable_for_server_and_clients(submitted):
    """What follows the script still wins."""
    server = run("pretrain.sbatch", "server.tls=null", "server.plaintext=true", CERTS="certs", **submitted).stdout
    tls = "server.tls={ca: certs/ca.pem, certificate: certs/body.pem, key: certs/body.key, revoked: certs/revoked.txt}"
    assert f"{tls} server.tls=null server.plaintext=true" in server
    task = {"SLURM_ARRAY_TASK_ID": "7", "SERVER": "gpu01:29600", "DRY_RUN": "1", "CERTS": "certs"}
    client = run("client.sbatch", **task).stdout
    assert "--id client-7 " in client
    assert "--ca certs/ca.pem --certificate certs/client-7.pem --key certs/client-7.key" in client
    assert "--ca" not in run("client.sbatch", **task | {"CERTS": ""}).stdout


def test_certificates_that_are_not_there_are_one_line(submitted):
    server = run("pretrain.sbatch", CERTS="certs", **submitted | {"DRY_RUN": "", "PYTHON": sys.executable})
    assert server.returncode == 1 and "certs/body.pem: no such file; fedbert-ds certs server body" in server.stderr
    client = run("client.sbatch", SERVER="gpu01:29600", CERTS="certs", FEDBERT_DS=sys.executable)
    assert client.returncode == 1 and "certs/client-0.pem: no such file; fedbert-ds certs client" in client.stderr
