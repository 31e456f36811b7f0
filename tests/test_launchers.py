"""Launchers: what they tell each process, that their files parse, when they try again, and a real
start by srun."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path, PurePath

import numpy as np
import pytest
import yaml

from jaxchat import cli, runtime
from jaxchat.peers import EXIT_FAILED, EXIT_LOST
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics
from jaxchat.train_loop import EXIT_INTERRUPTED
from scripts import base_train, data_download, tok_train

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


def read(name):
    """What a YAML file of scripts/runs/ describes."""
    return yaml.safe_load((RUNS / name).read_text())


def comments(name):
    lines = (RUNS / name).read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def parse(words):
    """Options of the script that `words` name, through its own parser."""
    start = next(i for i, word in enumerate(words) if word.startswith("scripts."))
    script = importlib.import_module(words[start])
    return cli.parse(script.Config, words[start + 1 :])


def commands(text):
    """Every `python -m scripts.NAME ...` in some text, parsed."""
    return [parse(shlex.split(line)) for line in re.findall(r"-m (scripts\.[^&|\n]+)", text)]


def what_it_runs(name):
    """What a launcher has one prepare, and the training that it starts."""
    if name == "slurm.sh":
        [options] = re.findall(r"sbatch scripts/runs/slurm.sh (.*)", comments(name))
        return commands(comments(name)), parse(["scripts.base_train", *options.split()])
    if name == "jobset.yaml":
        [workers] = read(name)["spec"]["replicatedJobs"]
        [container] = workers["template"]["spec"]["template"]["spec"]["containers"]
        return commands(comments(name)), parse(container["command"])
    job = read(name)
    *preparation, training = commands(job["run"].replace("$DEPTH", job["envs"]["DEPTH"]))
    return preparation, training


@pytest.mark.parametrize("name", ["slurm.sh", "jobset.yaml", "skypilot.yaml"])
def test_what_a_launcher_has_one_prepare_is_what_its_training_reads(name):
    (data, tokenizer), training = what_it_runs(name)
    assert isinstance(data, data_download.Config)
    assert isinstance(tokenizer, tok_train.Config)
    assert isinstance(training, base_train.Config)
    assert training.depth == 24
    assert training.save_every is not None
    shape = base_train.shape_of(training, vocab_size=tokenizer.vocab_size)
    plan = base_train.plan_of(training, shape, base_train.optimizer_of(training))
    # a token is 4.7 characters of ClimbMix, a shard 250 million
    assert data.dataset == "climbmix"
    assert data.num_shards * 250e6 > plan.target_tokens * 4.7


def test_the_jobset_gives_every_pod_what_it_needs():
    jobset = read("jobset.yaml")
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"  # gives JOB_COMPLETION_INDEX
    started = runtime.launch({**env, "JOB_COMPLETION_INDEX": "1"})
    assert started.count == job["completions"] == job["parallelism"]
    name, replicated = jobset["metadata"]["name"], workers["name"]
    assert started.coordinator == f"{name}-{replicated}-0-0.{name}:7733"
    assert {"containerPort": 7733} in container["ports"]
    [volume] = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    [mount] = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == volume]
    assert PurePath(env["JAXCHAT_BASE_DIR"]).is_relative_to(mount)


def instructions(name):
    """(keyword, rest) of every instruction of an image, continuation lines joined."""
    text = (RUNS / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_is_what_the_jobset_wants_and_serves():
    made = instructions("Dockerfile")
    given = {key: rest for key, rest in made if key != "RUN"}
    runs = " ".join(rest for key, rest in made if key == "RUN")
    [workers] = read("jobset.yaml")["spec"]["replicatedJobs"]
    pod = workers["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["workingDir"] == given["WORKDIR"]
    assert f"--uid {pod['securityContext']['fsGroup']} {given['USER']}" in runs
    assert "scripts/setup.sh" in runs and (ROOT / "scripts" / "setup.sh").exists()
    env = dict(word.split("=", 1) for key, rest in made if key == "ENV" for word in rest.split())
    assert env["JAXCHAT_BASE_DIR"] == given["VOLUME"]
    assert env["PATH"].split(":")[0] == f"{given['WORKDIR']}/.venv/bin"
    assert env["UV_NO_DEV"] == "1"
    served = parse(json.loads(given["CMD"]))
    assert (served.host, str(served.port)) == ("0.0.0.0", given["EXPOSE"])
    [told] = commands(comments("Dockerfile").replace("\\\n#", ""))
    assert told == served


def test_the_jobset_starts_again_after_a_loss_and_not_after_an_error():
    """Kubernetes passes a pod's exit status to JobSet as the reason for which its Job fails."""
    spec = read("jobset.yaml")["spec"]
    [workers] = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    errors = rule["onExitCodes"]
    assert (rule["action"], errors["operator"]) == ("FailJob", "In")
    assert errors["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy wants it
    assert {1, EXIT_FAILED} == set(errors["values"])
    assert not {EXIT_LOST, EXIT_INTERRUPTED} & set(errors["values"])
    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] > 0
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_skypilot_job_recovers_on_a_file_system_of_all_nodes():
    """A mounted bucket appends, renames or locks for one node at best."""
    job, volume = read("skypilot.yaml"), read("skypilot-volume.yaml")
    assert job["resources"]["use_spot"]
    assert job["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    for script in (job["run"], job["setup"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "file_mounts" not in job
    [(mount, name)] = job["volumes"].items()
    assert PurePath(job["envs"]["JAXCHAT_BASE_DIR"]).is_relative_to(mount)
    assert (name, job["resources"]["infra"]) == (volume["name"], volume["infra"])
    assert (volume["type"], volume["config"]["access_mode"]) == ("k8s-pvc", "ReadWriteMany")
    assert "sky volumes apply scripts/runs/skypilot-volume.yaml" in comments("skypilot.yaml")


FAKE_SRUN = """
    # Slurm's own in what matters here: it kills all processes when it gets a SIGTERM or, where a
    # cluster has KillOnBadExit, when one of them fails; it returns the highest status.
    import os, pathlib, signal, subprocess, sys, time
    processes = []
    def kill(*_):
        for process in processes:
            process.kill()
    signal.signal(signal.SIGTERM, kill)
    options, command = [], sys.argv[1:]
    while command[0].startswith("-"):
        options.append(command.pop(0))
    for index in range(2):
        step = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": "0",
                "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_STEP_NODELIST": "localhost,other"}
        processes.append(subprocess.Popen(command, env={**os.environ, **step}))
    pids = " ".join(str(process.pid) for process in processes)
    pathlib.Path(os.environ["JAXCHAT_BASE_DIR"], "pids").write_text(pids)
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) and "--kill-on-bad-exit=0" not in options:
            kill()
        time.sleep(0.02)
    statuses = [process.wait() for process in processes]
    sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""

FAKE_TRAINING = """
    # Saves the checkpoint SAVED, then ends with its status of STATUSES: soon, or (WAIT) when told.
    set -- $STATUSES
    shift "$SLURM_PROCID"
    [ -z "$SAVED" ] || mkdir -p "$JAXCHAT_BASE_DIR/base_checkpoints/d24/$SAVED"
    if [ -n "$WAIT" ]; then
        trap "exit $1" TERM
        until [ -s "$JAXCHAT_BASE_DIR/pids" ]; do sleep 0.05; done
        echo "step 2"
        for _ in $(seq 400); do sleep 0.05; done
    fi
    sleep "0.$((3 * SLURM_PROCID))"
    [ "$1" != 137 ] || kill -KILL $$
    exit "$1"
"""


def write_program(path, interpreter, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}{textwrap.dedent(text)}")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A base directory, and srun and scontrol that need no cluster."""
    write_program(tmp_path / "bin" / "srun", sys.executable, FAKE_SRUN)
    requeue = f'\necho "$@" >>{tmp_path}/requeued\n'
    write_program(tmp_path / "bin" / "scontrol", "/bin/sh", requeue)
    return tmp_path


@pytest.fixture
def fake_training(cluster):
    """The cluster, where a shell script stands for Python; it has trained before."""
    write_program(cluster / ".venv" / "bin" / "python", "/bin/sh", FAKE_TRAINING)
    (cluster / "base_checkpoints" / "d24" / "step_000250").mkdir(parents=True)
    return cluster


@pytest.fixture
def corpus(cluster):
    """Text, and a tokenizer in the base directory."""
    text = cluster / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    words = np.array(WORDS.split())
    for i in range(40):
        (text / f"{i:03d}.txt").write_text(" ".join(rng.choice(words, 80)))
    tokenizer = Tokenizer.train((p.read_text() for p in sorted(text.iterdir())), vocab_size=300)
    tokenizer.save(cluster / "tokenizer")
    return text


def submit(base, *options, **settings):
    """The batch script, as Slurm starts it."""
    env = {
        **os.environ,
        "PATH": f"{base / 'bin'}:{os.environ['PATH']}",
        "JAXCHAT_BASE_DIR": str(base),
        "SLURM_JOB_ID": str(os.getpid()),
        **settings,
    }
    words = [str(RUNS / "slurm.sh"), *options]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)


def wait_for_step_2(job):
    assert any(line.startswith("step 2") for line in job.stdout)


def terminate_processes(base):
    for pid in (base / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)


def warn(job, base):
    """Slurm's signal before the time limit, sent to the batch shell (B:) or to all processes."""
    [shell] = re.findall(r"^#SBATCH --signal=(B:)?TERM@", (RUNS / "slurm.sh").read_text(), re.M)
    if shell:
        job.send_signal(signal.SIGTERM)
    else:
        terminate_processes(base)


@pytest.mark.parametrize(
    ("statuses", "saved", "again"),
    [
        ("143 143", "", True),
        ("75 137", "step_000500", True),
        ("75 134", "step_000500", True),
        ("75 137", "", False),
        ("75 137", "step_000500.tmp", False),
        ("75 2", "", False),  # the highest status hides an error
        ("134 1", "", False),
        ("2 2", "step_000500", False),
        ("1 0", "step_000500", False),
        ("0 0", "step_000500", False),
    ],
)
def test_a_slurm_job_is_tried_again_where_that_gets_further(fake_training, statuses, saved, again):
    settings = {"STATUSES": statuses, "SAVED": saved, "WAIT": ""}
    with submit(fake_training, SLURM_SUBMIT_DIR=str(fake_training), **settings) as job:
        output = job.stdout.read()
    highest = max(map(int, statuses.split()))
    assert (fake_training / "requeued").exists() == again
    assert job.returncode == (0 if again else highest)
    assert (f"exit status {highest}: back into the queue" in output) == again


def test_a_slurm_job_is_not_tried_again_without_end(fake_training):
    settings = {"STATUSES": "143 143", "SAVED": "", "WAIT": "", "SLURM_RESTART_COUNT": "20"}
    with submit(fake_training, SLURM_SUBMIT_DIR=str(fake_training), **settings) as job:
        pass
    assert job.returncode == 143
    assert not (fake_training / "requeued").exists()


@pytest.mark.parametrize(("restarts", "asked"), [("0", "never"), ("1", "auto")])
def test_a_slurm_job_that_comes_back_continues_whatever_it_was_told(cluster, restarts, asked):
    """Told to start over it would at every time limit, and set a day's work aside each time."""
    heard = cluster / "heard"
    write_program(cluster / ".venv" / "bin" / "python", "/bin/sh", f'\necho "$@" >>{heard}\n')
    settings = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_RESTART_COUNT": restarts}
    with submit(cluster, "--depth", "2", "--resume", "never", **settings):
        pass
    words = heard.read_text().splitlines()[0].split()
    assert words[:2] == ["-m", "scripts.base_train"]
    assert cli.parse(base_train.Config, words[2:]).resume == asked


def test_a_slurm_job_that_is_cancelled_does_not_come_back(fake_training):
    """`scancel` sends SIGTERM to the batch shell too, and the processes save as ever."""
    settings = {"STATUSES": "143 143", "SAVED": "", "WAIT": "1"}
    with submit(fake_training, SLURM_SUBMIT_DIR=str(fake_training), **settings) as job:
        wait_for_step_2(job)
        job.send_signal(signal.SIGTERM)
        terminate_processes(fake_training)
        job.stdout.read()
    assert job.returncode == -signal.SIGTERM
    assert not (fake_training / "requeued").exists()


@pytest.mark.slow
def test_a_slurm_job_trains_on_two_processes_and_goes_back_into_the_queue(cluster, corpus):
    """Slurm's warning before the time limit: both processes save, the job is requeued."""
    options = (
        "--depth 1 --aspect-ratio 32 --head-dim 32 --sequence-len 64 --device-batch-size 2 "
        "--total-batch-size 512 --num-iterations 100000 --eval-tokens 512 --model-tag tiny "
        f"--sample-every 100000 --corpus {corpus}"
    ).split()
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "SLURM_SUBMIT_DIR": str(ROOT)}
    with submit(cluster, *options, **settings) as job:
        wait_for_step_2(job)
        warn(job, cluster)
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
