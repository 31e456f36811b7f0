"""Launchers: what they tell each process, that their files parse, and a real start by srun."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxchat import cli, runtime
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics
from scripts import base_train

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "scripts" / "runs"

WORDS = "the a model reads writes token step loss of and to learns"

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "3",
    "SKYPILOT_NODE_RANK": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n10.0.0.6",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (
            {
                "JAXCHAT_COORDINATOR": "a:1",
                "JAXCHAT_PROCESS_COUNT": "4",
                "JOB_COMPLETION_INDEX": "3",
            },
            ("JAXCHAT_COORDINATOR", 3, 4, "a:1", None),
        ),
        (
            {**SLURM, "JAXCHAT_COORDINATOR": "a", "JAXCHAT_PROCESS_COUNT": "2"}
            | {"JAXCHAT_PROCESS_INDEX": "0"},
            ("JAXCHAT_COORDINATOR", 0, 2, "a:7733", None),
        ),
        (SKYPILOT, ("SkyPilot", 2, 3, "10.0.0.4:7733", None)),
        ({**SKYPILOT, "SKYPILOT_NUM_NODES": "1"}, None),
        (SLURM, ("Slurm", 1, 2, "node07:7737", None)),
        (
            {**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
            | {"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu-a,gpu-b"},
            ("Slurm", 1, 4, "gpu-a:7737", [1]),
        ),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # a shell in an allocation
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            ("Open MPI", 1, None, None, None),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"},
            ("Cloud TPU", 1, None, None, None),
        ),
    ],
)
def test_a_process_learns_its_place_from_its_launcher(env, expected):
    found = runtime.launch(env)
    assert (found if found is None else tuple(found)) == expected


def test_half_an_address_says_what_is_missing():
    with pytest.raises(ValueError, match="wants JAXCHAT_PROCESS_COUNT and JAXCHAT_PROCESS_INDEX"):
        runtime.launch({"JAXCHAT_COORDINATOR": "a:1"})


def parse(words):
    """The training command among `words`, through the script's own parser."""
    start = words.index("scripts.base_train") + 1
    return cli.parse(base_train.Config, words[start:])


def test_the_jobset_gives_every_pod_what_it_needs():
    jobset = yaml.safe_load((RUNS / "jobset.yaml").read_text())
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert parse(container["command"]).depth == 24
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"  # gives JOB_COMPLETION_INDEX
    started = runtime.launch({**env, "JOB_COMPLETION_INDEX": "1"})
    assert started.count == job["completions"] == job["parallelism"]
    name, replicated = jobset["metadata"]["name"], workers["name"]
    assert started.coordinator == f"{name}-{replicated}-0-0.{name}:7733"
    assert {"containerPort": 7733} in container["ports"]


def test_the_skypilot_job_recovers_and_its_commands_parse():
    job = yaml.safe_load((RUNS / "skypilot.yaml").read_text())
    assert job["resources"]["use_spot"]
    assert job["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    command = next(line for line in job["run"].splitlines() if "scripts.base_train" in line)
    assert parse(shlex.split(command.replace("$DEPTH", job["envs"]["DEPTH"]))).depth == 24
    for script in (job["run"], job["setup"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    [mount] = job["file_mounts"]
    assert job["envs"]["JAXCHAT_BASE_DIR"].startswith(mount)


FAKE_SRUN = """
    import os, signal, subprocess, sys
    processes = []
    def forward(number, _):
        for process in processes:
            process.send_signal(number)
    signal.signal(signal.SIGTERM, forward)
    for index in range(2):
        step = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": "0",
                "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_STEP_NODELIST": "localhost,other"}
        processes.append(subprocess.Popen(sys.argv[1:], env={**os.environ, **step}))
    sys.exit(max(process.wait() % 256 for process in processes))
"""


@pytest.fixture
def cluster(tmp_path):
    """A base directory with text and a tokenizer, and srun and scontrol that need no cluster."""
    text = tmp_path / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    words = np.array(WORDS.split())
    for i in range(40):
        (text / f"{i:03d}.txt").write_text(" ".join(rng.choice(words, 80)))
    tokenizer = Tokenizer.train((p.read_text() for p in sorted(text.iterdir())), vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f"#!{sys.executable}{textwrap.dedent(FAKE_SRUN)}")
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/requeued\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return tmp_path


def submit(cluster, iterations):
    options = (
        "--depth 1 --aspect-ratio 32 --head-dim 32 --sequence-len 64 --device-batch-size 2 "
        f"--total-batch-size 512 --num-iterations {iterations} --eval-tokens 512 --model-tag tiny "
        f"--sample-every 100000 --corpus {cluster / 'text'}"
    ).split()
    env = {
        **os.environ,
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "JAXCHAT_BASE_DIR": str(cluster),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    words = [str(RUNS / "slurm.sh"), *options]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_slurm_job_trains_on_two_processes_and_goes_back_into_the_queue(cluster):
    """Slurm's warning before the time limit: both processes save, the job is requeued."""
    with submit(cluster, iterations=100_000) as job:
        for line in job.stdout:
            if line.startswith("step 2"):
                job.send_signal(signal.SIGTERM)
                break
        output = job.stdout.read()
    assert job.returncode == 0, output
    assert "stopped by SIGTERM" in output
    assert "exit status 143: back into the queue" in output
    assert (cluster / "requeued").read_text() == f"requeue {os.getpid()}\n"
    run = cluster / "base_checkpoints" / "tiny"
    [saved] = [int(path.name[5:]) for path in run.glob("step_*")]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, saved + 1))
    assert all(row["train/batch_tokens"] == 512 for row in rows if "train/loss" in row)
