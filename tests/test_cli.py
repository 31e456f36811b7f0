"""Command lines: every one that we print parses, and a wrong one is told what would be right."""

import contextlib
import errno
import importlib
import re
import shlex
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import docstring_parser
import pytest

from jaxchat import cli
from jaxchat.stages import STAGE_FOLDERS, how_to_talk

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("[a-z]*.py"))
PACKAGES = ("jaxchat", "torch_ref", "scripts")


RESEARCH = sorted(
    path
    for path in (ROOT / "scripts" / "runs").glob("*.sh")
    if "ledger.sh" in path.read_text()  # the others launch one job and belong to test_launchers
)


def written_commands():
    """(file, words) of every `python -m scripts.NAME ...` in README, docs and docstrings."""
    for path in (ROOT / "README.md", *(ROOT / "scripts").glob("*.py")):
        text = path.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        for line in re.findall(
            r"python -m (scripts\.[a-z_]+[^\n`\"]*(?:\"[^\"\n]*\"[^\n`\"]*)*)", text
        ):
            words = shlex.split(line.split("  #")[0].rstrip(".,;:"))
            yield path.name, [word for word in words if "{" not in word]


def speedrun_commands(tier):
    """The stages of a tier, as the shell script itself expands them."""
    script = (ROOT / "speedrun_jax.sh").read_text()
    recipe = script.split("# --- The environment")[0]
    stages = re.findall(r"^stage (.*)$", script, re.MULTILINE)
    echo = "".join(f'printf "%s\\n" "$(printf " %q" {stage})"\n' for stage in stages)
    shell = subprocess.run(
        ["bash", "-c", recipe + echo, str(ROOT / "speedrun_jax.sh")],
        env={"JAXCHAT_TIER": tier, "PATH": "/usr/bin:/bin", "HOME": "/nowhere"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in shell.stdout.splitlines() if line.startswith(" ")]


def research_commands(script):
    """The commands of a script of scripts/runs/, as it prints them when asked to do nothing."""
    shell = subprocess.run(
        ["bash", str(script)],
        env={"DRY_RUN": "1", "PATH": "/usr/bin:/bin", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in shell.stdout.splitlines():
        python, m, *words = shlex.split(line)
        assert (python, m) == (".venv/bin/python", "-m")
        yield words


def parse(words):
    module = importlib.import_module(words[0])
    return cli.parse(module.Config, words[1:])


@pytest.mark.parametrize("tier", ["node", "gpu", "cpu", "smoke"])
def test_every_stage_of_every_tier_parses(tier):
    commands = speedrun_commands(tier)
    assert len(commands) >= 6
    for name, *words in commands:
        parse([f"scripts.{name}", *words])


@pytest.mark.parametrize("stage", STAGE_FOLDERS)
def test_the_command_that_a_stage_ends_with_talks_to_its_result(stage):
    python, m, *words = shlex.split(how_to_talk(stage, "mine").split(": ")[1])
    assert (python, m) == ("python", "-m")
    config = parse(words)
    assert (config.source, config.model_tag) == (stage, "mine")


@pytest.mark.parametrize("script", RESEARCH, ids=lambda path: path.stem)
def test_every_command_of_every_research_run_parses(script):
    commands = list(research_commands(script))
    assert "scripts.base_train" in {words[0] for words in commands}
    for words in commands:
        parse(words)


def test_a_mac_takes_the_laptop_tier_on_torch(tmp_path):
    """The script chooses sizes, the scripts' own default chooses the backend."""
    import subprocess
    import sys

    (tmp_path / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (tmp_path / "uname").chmod(0o755)
    recipe = (ROOT / "speedrun_jax.sh").read_text().split("# --- The environment")[0]
    shell = subprocess.run(
        ["bash", "-c", recipe, str(ROOT / "speedrun_jax.sh")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tier cpu (a Mac, so on PyTorch)" in shell.stdout
    as_a_mac = (
        "import numpy, sys, urllib.request; sys.platform = 'darwin'; import jaxchat.backend as b; "
    )
    python = [sys.executable, "-c", as_a_mac + "print(b.DEFAULT_BACKEND)"]
    assert subprocess.check_output(python, cwd=ROOT, text=True) == "torch\n"


NVIDIA_SMI = """#!/bin/bash
# four cards, the second smaller; the fifth does not say
sizes=(81559 16384 81559 81559 [N/A])
numbers=0,1,2,3,4
[[ "$1" == -i ]] && numbers="$2"
[[ "$numbers" =~ ^[0-4](,[0-4])*$ ]] || exit 6
for number in ${numbers//,/ }; do echo "${sizes[number]}"; done
"""


@pytest.mark.parametrize(
    ("visible", "gpus", "memory"),
    [
        (None, 5, 0),
        ("0,2", 2, 81559),
        ("3,1", 2, 16384),
        ("4", 1, 0),
        ("", 0, 0),
        ("-1", 0, 0),
        ("MIG-1234", 1, 0),
        ("7", 0, 0),
    ],
)
def test_gpus_are_those_that_cuda_will_see(tmp_path, visible, gpus, memory):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    told = subprocess.check_output(
        ["bash", "-euc", ". scripts/hardware.sh; echo $gpus $gpu_memory_mib ${extras[*]-}"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
        | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
        cwd=ROOT,
        text=True,
    )
    assert told.split() == [str(gpus), str(memory), *(["--extra", "gpu"] if gpus else [])]


@pytest.mark.parametrize("script", ["speedrun_jax.sh", "scripts/runs/cpu_scaling.sh"])
def test_scripts_without_arguments_refuse_them_before_they_do_anything(tmp_path, script):
    shell = subprocess.run(
        ["bash", str(ROOT / script), "--help"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shell.returncode, shell.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert "takes no arguments" in shell.stderr


def test_tpu_chips_are_counted_among_googles_devices(tmp_path):
    ids = [("0x1ae0", "0x0063"), ("0x1ae0", "0x006f"), ("0x1ae0", "0x0042"), ("0x10de", "0x0063")]
    for number, (vendor, device) in enumerate(ids):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(vendor + "\n")
        (tmp_path / str(number) / "device").write_text(device + "\n")
    script = (ROOT / "scripts" / "hardware.sh").read_text()
    count = script[script.index("tpu_chips() {") : script.index("tpus=$(")]
    for folder, expected in ((tmp_path, "2\n"), (tmp_path / "0" / "empty", "0\n")):
        told = subprocess.check_output(["bash", "-euc", f'{count}tpu_chips "{folder}"'], text=True)
        assert told == expected


def test_every_written_command_parses():
    commands = list(written_commands())
    assert {name for name, _ in commands} >= {"README.md", "base_train.py"}
    for _, words in commands:
        parse(words)


@pytest.mark.parametrize("name", ["base_eval", "chat_eval", "mid_train", "chat_sft", "chat_rl"])
def test_a_stage_out_of_order_says_so_before_any_slow_work(name, base_dir, monkeypatch):
    monkeypatch.setattr("jaxchat.embedded_corpus.harvest", lambda: pytest.fail("slow work"))
    module = importlib.import_module(f"scripts.{name}")
    with pytest.raises(FileNotFoundError, match=r"no (base|mid|sft) model in .*: train one with"):
        module.main(module.Config())


def test_rollouts_need_a_micro_batch():
    with pytest.raises(ValueError, match="--device-batch-size 0: must be above 0"):
        importlib.import_module("scripts.chat_rl").Config(device_batch_size=0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_option(name, capsys):
    module = importlib.import_module(f"scripts.{name}")
    with pytest.raises(SystemExit) as stop:
        cli.parse(module.Config, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m scripts.{name}" in shown
    told = {
        param.arg_name: param.description
        for each in module.Config.__mro__[:-1]
        for param in docstring_parser.parse_from_object(each).params
    }
    for field in module.Config.__dataclass_fields__:
        assert told.get(field), f"{field} is not explained"
        assert "\n" not in told[field], f"{field}: help would be broken where the source is"
        flags = (f"--{field.replace('_', '-')}", f"--no-{field}", f" {field.upper()} ")
        assert any(flag in shown for flag in flags), field


def test_an_unknown_flag_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["scripts.base_train", "--dept", "4"])
    assert stop.value.code == 2
    assert "--depth" in capsys.readouterr().err


def test_dashes_and_underscores_are_the_same():
    assert parse(["scripts.base_train", "--total_batch_size", "4096"]) == parse(
        ["scripts.base_train", "--total-batch-size", "4096"]
    )


def test_a_users_mistake_is_one_line_and_ours_a_traceback(capsys, monkeypatch):
    from scripts import report

    monkeypatch.setattr("sys.argv", ["report"])

    def fail(error):
        def main(_):
            raise error

        return main

    with pytest.raises(SystemExit) as stop:
        cli.run(fail(ValueError("batch 3 is odd; use 4")), report.Config)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: batch 3 is odd; use 4\n"
    with pytest.raises(KeyError):
        cli.run(fail(KeyError("ours")), report.Config)
    with pytest.raises(SystemExit):
        cli.run(fail(OSError(errno.ENOSPC, "No space left on device")), report.Config)
    assert "No space left on device: make room, or let JAXCHAT_BASE" in capsys.readouterr().err
    for error in (
        OSError("a server says \x1b]0;x\x07"),
        RuntimeError("RESOURCE_EXHAUSTED: \x1b[2J"),
    ):
        with pytest.raises(SystemExit):
            cli.run(fail(error), report.Config)
        assert "\x1b" not in capsys.readouterr().err


def test_what_a_server_says_drives_no_terminal_either(tmp_path, capsys, monkeypatch):
    from scripts import gen_synthetic_data as module

    (tmp_path / "about").write_text("Ada")
    monkeypatch.setattr(module, "connected", contextlib.nullcontext)
    monkeypatch.setattr(module, "collect", lambda *_: Counter({"status 400: \x1b[2J": 3}))
    config = module.Config(about=tmp_path / "about", output=tmp_path / "out", model="m")
    with pytest.raises(ValueError, match="m wrote no conversation"):
        module.main(config)
    assert "status 400: \ufffd[2J" in capsys.readouterr().out


def test_what_is_printable_is_all_but_what_drives_a_terminal():
    texts = "a\tb\nc", "\u00a0\u3000", "e\u0301", "\u2764\ufe0f", "\u0645\u06cc\u200c\u062e"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    england = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    for text in (*texts, family, england, "\U0001fae9 of Unicode 16", "\u05d0\u200f!"):
        assert cli.printable(text) == text
    controls = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Cc", "Cs")]
    for control in {*controls, *"\u2028\u2029\u202a\u202e\u2066\u2069"} - {"\n", "\t"}:
        assert cli.printable(f"a{control}b") == "a\ufffdb"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scripts.tok_train", "--vocab-size", "100"], "vocab_size 100 must be at least 265"),
        (["scripts.data_download", "--dataset", "x"], "dataset 'x': choose one of climbmix"),
        (["scripts.base_eval", "--max-per-task", "0"], "--max-per-task 0: must be above 0"),
    ],
)
def test_impossible_values_are_named(words, message, capsys, monkeypatch):
    module = importlib.import_module(words[0])
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main, module.Config)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_readme_lists_every_setting_of_ours_in_the_environment():
    name = r"JAXCHAT_[A-Z_]+"
    code = [ROOT / "speedrun_jax.sh", *(p for d in PACKAGES for p in (ROOT / d).rglob("*.py"))]
    used = {found for path in code for found in re.findall(rf"\b{name}\b", path.read_text())}
    section = (ROOT / "README.md").read_text().split("## Set by the environment")[1]
    assert used == set(re.findall(rf"`({name})[`=]", section.split("\n## ")[0]))


SPEAKER = """
from dataclasses import dataclass
from jaxchat import cli

@dataclass(frozen=True)
class Config:
    text: str

def main(config):
    for _ in range(100_000):
        print(config.text, flush=True)
    raise BrokenPipeError(32, "another pipe")

cli.run(main, Config)
"""


@pytest.mark.parametrize(
    ("reader", "status", "said"), [("head -n 1", 141, ""), ("cat", 2, "another pipe")]
)
def test_who_stops_reading_gets_no_error(tmp_path, reader, status, said):
    (tmp_path / "speaker.py").write_text(SPEAKER)
    shell = f"{sys.executable} {tmp_path}/speaker.py --text a | {reader} >/dev/null"
    done = subprocess.run(
        ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (done.returncode, said in done.stderr, bool(done.stderr)) == (status, True, bool(said))
