"""A library to ask questions about."""

import pytest

from jaxchat import embedded_corpus


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A base directory whose embedded corpus is the documentation of two packages."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("library")
        (root / "stdlib").mkdir()
        patch.setenv("JAXCHAT_BASE_DIR", str(root / "base"))
        patch.setattr(embedded_corpus, "DISTRIBUTIONS", ("networkx", "optax", "requests", "rich"))
        patch.setattr(embedded_corpus.sysconfig, "get_path", lambda _: str(root / "stdlib"))
        embedded_corpus.ensure_embedded_corpus()
        yield root
