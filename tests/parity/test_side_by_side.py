"""`jaxchat/gpt.py` and `torch_ref/gpt.py` can be read side by side."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_two_models_scroll_in_step():
    """The same classes, methods and functions in the same order, but for one trick of JAX's."""
    names = {framework: definitions(framework) for framework in ("jaxchat", "torch_ref")}
    names["jaxchat"].remove("_few_rows")
    called = ["forward" if name == "__call__" else name for name in names["jaxchat"]]
    assert called == names["torch_ref"]


def definitions(package):
    """Names of everything that `package`/gpt.py defines, from top to bottom."""
    source = (ROOT / package / "gpt.py").read_text()
    return re.findall(r"^ *(?:class|def) (\w+)", source, re.MULTILINE)
