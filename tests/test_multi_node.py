"""The scripts for several machines: their commands are right, and they run; this machine plays nodes and SLURM."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_line import TINY, saved_weights, succeed
from test_resume import ROOT

EXAMPLES = ROOT / "examples/multi_node"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
TRAINING = [EXAMPLES / "torchrun.sh", EXAMPLES / "train.sbatch"]
CONFIG = "configs/quickstart.yaml"
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lit-rlvr", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "MASTER_ADDR": "localhost", "SLURM_CPUS_PER_TASK": "1",
}  # fmt: skip
SRUN = """#!/usr/bin/env bash
# srun's part: the command twice, with what tells each who it is; USR1 goes to both. The first that ends badly ends the
# other, and the highest exit code is srun's. A process has the cores that srun, not the job, is told.
[[ $1 == --kill-on-bad-exit=1 && $2 == --cpus-per-task="$SLURM_CPUS_PER_TASK" ]] || exit 99
shift 2
pids=() code=0
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
for _ in 0 1; do
  until wait -n -p ended; one=$?; [[ -n $ended ]]; do :; done
  (( one > code )) && code=$one
  (( one )) && kill "${pids[@]}" 2> /dev/null
done
exit "$code"
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH, with commands that are there on a cluster."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command(folder / "torchrun", f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"')
    command(folder / "lit-rlvr", f'exec {shlex.quote(sys.executable)} -m lit_rlvr "$@"')
    command(folder / "scontrol", f'echo "$@" >> {shlex.quote(str(tmp_path / "scontrol"))}')
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    return folder


def command(path: Path, line: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{line}\n")
    path.chmod(0o755)


def environment(commands: Path, **more: str) -> dict[str, str]:
    """What a script is started with; ``tests`` can be imported."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **SLURM, **found, **more}


def test_there_are_scripts() -> None:
    assert {script.name for script in SCRIPTS} == {"serve.sbatch", "torchrun.sh", "train.sbatch"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_bash_and_can_be_started(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.name)
def test_the_command_in_a_script_is_a_run(script: Path, commands: Path, tmp_path: Path) -> None:
    """Its arguments, written down in place of being run, make the configuration that they should."""
    seen = tmp_path / "seen"
    for name in ("torchrun", "srun"):
        command(commands / name, f'printf "%s\\n" "$@" > {shlex.quote(str(seen))}')
    (tmp_path / "run/checkpoints/phase_000001.ckpt").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").symlink_to("phase_000001.ckpt")
    more = environment(
        commands, RUN=str(tmp_path / "run"), NODES="1", DEVICES="2", HEAD="node1", SLURM_CPUS_PER_TASK="3"
    )
    subprocess.run([str(script), CONFIG, "--model.seed=3"], env=more, cwd=ROOT, check=True)
    words = seen.read_text().splitlines()
    assert words[words.index("fit") - 1] in ("lit_rlvr", "lit-rlvr")
    if script.suffix == ".sh":
        assert {"--nnodes=1", "--nproc-per-node=2", "--rdzv-endpoint=node1:29500"} <= set(words)
    else:
        assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    arguments = [str(ROOT / w) if w.endswith(".yaml") else w for w in words[words.index("fit") :]]
    made = yaml.safe_load(succeed(tmp_path, *arguments, "--print_config").out)
    assert made["ckpt_path"] == str(tmp_path / "run/checkpoints/last.ckpt")
    assert made["model"]["seed"] == 3
    trainer = made["trainer"]
    assert (trainer["num_nodes"], int(trainer["devices"]), trainer["accelerator"]) == (1, 2, "cuda")
    assert trainer["strategy"]["class_path"] == "lit_rlvr.sharding.FSDP2Strategy"


def test_the_server_is_started_as_it_should(commands: Path, tmp_path: Path) -> None:
    command(commands / "lit-rlvr", 'printf "%s\\n" "$@"')
    more = environment(commands, PORT="9000", DEVICES="4")
    done = subprocess.run(
        [str(EXAMPLES / "serve.sbatch"), "MODEL", "--max-model-len=4096"], env=more, cwd=ROOT, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    address, *words = done.stdout.splitlines()
    assert address.startswith("http://")
    assert address.endswith(":9000")
    served = ["serve", "MODEL", "--python", ".vllm-env/bin/python", "--host", "0.0.0.0", "--port", "9000"]
    assert words == [*served, "--tensor-parallel-size", "4", "--max-model-len=4096"]


def job(commands: Path, run: Path, does: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The batch script, with something else in the run's place."""
    command(commands / "srun", does)
    (run / "checkpoints").mkdir(parents=True)
    command_line = [str(EXAMPLES / "train.sbatch"), CONFIG]
    given = environment(commands, RUN=str(run), **more)
    return subprocess.run(command_line, env=given, cwd=ROOT, timeout=60, capture_output=True, text=True, check=False)


PHASE = 'ln -s phase_000001.ckpt "$RUN/checkpoints/last.ckpt"'
STOPPED = 'echo SIGTERM > "$RUN/checkpoints/stopped"'
TOLD = "trap '' USR1; kill -USR1 $PPID"
"""What a run may do: save a checkpoint, say that it was stopped, be told to stop and not hear."""


@pytest.mark.parametrize(
    ("does", "code", "requeued", "said"),
    [
        ("exit 0", 0, False, ""),
        ("exit 1", 1, False, ""),
        (f"{PHASE}; {STOPPED}; exit 143", 143, True, ""),
        (f"{PHASE}; {TOLD}; exec sleep 4", 1, True, "goes on from phase_000001.ckpt"),
        (f"{TOLD}; exec sleep 4", 1, False, "no rollout phase ended in the time of this job"),
    ],
    ids=["finished", "failed", "stopped", "too slow", "far too slow"],
)
def test_a_job_is_requeued_when_it_can_go_on(
    does: str, code: int, requeued: bool, said: str, commands: Path, tmp_path: Path
) -> None:
    """When the run was stopped, and when its phase does not end in the seconds that it is given but one has before."""
    done = job(commands, tmp_path / "run", does, GRACE="1")
    assert (done.returncode, (tmp_path / "scontrol").exists()) == (code, requeued), done.stderr
    assert said in done.stderr


def test_an_old_mark_requeues_nothing(commands: Path, tmp_path: Path) -> None:
    """Of a job before, whose successor fails before it trains."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/stopped").touch()
    command(commands / "srun", "exit 3")
    more = environment(commands, RUN=str(tmp_path / "run"))
    done = subprocess.run([str(EXAMPLES / "train.sbatch"), CONFIG], env=more, cwd=ROOT, timeout=60, check=False)
    assert (done.returncode, (tmp_path / "scontrol").exists()) == (3, False)


OPTIONS = [*TINY[2:], "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.val_check_interval=1000"]
"""Two phases of two steps, in one node's time."""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_train(commands: Path, tmp_path: Path) -> None:
    """The script once per node, as two nodes of one process each that meet at a port; then a plain run of two."""
    run = str(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", FREE_PORT], stdout=subprocess.PIPE, text=True) as found:
        port, _ = found.communicate()
    more = environment(commands, RUN=run, NODES="2", DEVICES="1", HEAD="localhost", PORT=port.strip())
    nodes = [
        subprocess.Popen([str(EXAMPLES / "torchrun.sh"), CONFIG, *OPTIONS], env=more, cwd=ROOT, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for node in nodes:
        _, err = node.communicate(timeout=300)
        assert node.returncode == 0, err.decode()[-3000:]
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"last.ckpt", "phase_000002.ckpt"}
    assert {p.name for p in (tmp_path / "run/checkpoints/last.ckpt").iterdir()} >= {"__0_0.distcp", "__1_0.distcp"}
    assert saved_weights(tmp_path / "run/policy")


FREE_PORT = "import socket; s = socket.socket(); s.bind(('localhost', 0)); print(s.getsockname()[1])"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_job_is_requeued_and_goes_on(commands: Path, tmp_path: Path) -> None:
    """Told by USR1 in its first phases, it asks to be requeued; started again, it goes on to the end, bit for bit."""
    script, run = str(EXAMPLES / "train.sbatch"), tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", FREE_PORT], stdout=subprocess.PIPE, text=True) as found:
        port, _ = found.communicate()
    more = environment(commands, RUN=str(run), MASTER_PORT=port.strip())
    saving = ("--trainer.callbacks+=PhaseCheckpoint", "--trainer.callbacks.every=1")
    arguments = [script, CONFIG, *OPTIONS, *saving]
    log = tmp_path / "log"
    with log.open("w") as err:
        job = subprocess.Popen([*arguments, "--trainer.max_steps=2000"], env=more, cwd=ROOT, stderr=err)
    deadline = time.time() + 200
    while not (run / "checkpoints/last.ckpt").exists():
        assert job.poll() is None, log.read_text()[-3000:]
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGUSR1)  # SLURM tells the script
    assert job.wait(120) != 0, log.read_text()[-3000:]
    assert "stopped by SIGUSR1" in " ".join(log.read_text().split())
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    steps = 2 * int((run / "checkpoints/last.ckpt").resolve().stem.removeprefix("phase_")) + 4
    subprocess.run([*arguments, f"--trainer.max_steps={steps}"], env=more, cwd=ROOT, check=True, timeout=200)
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    straight = {**more, "RUN": str(tmp_path / "straight")}
    subprocess.run([*arguments, f"--trainer.max_steps={steps}"], env=straight, cwd=ROOT, check=True, timeout=200)
    ours, theirs = saved_weights(run / "policy"), saved_weights(tmp_path / "straight/policy")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
