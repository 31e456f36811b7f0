"""The real data sets that developers' machines and CI have, and others have not."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("JAXCHAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="no real data sets: name a folder in JAXCHAT_TEST_DATA"
)
