"""Draw the report of everything that has run so far.

    python -m scripts.report

Writes report.md and its pictures in the base directory, copies both (report.md, report_files/)
into the current directory, and prints where. What the stages stored stays as it is, so it can run
at any time, on any machine that may write to the base directory.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jaxchat import artifacts, cli
from jaxchat.report import Report
from jaxchat.report_page import render


@dataclass(frozen=True)
class Config:
    """Where the copy goes."""

    output: Path = Path()
    """Folder that receives report.md and report_files/."""


def main(config: Config) -> None:
    """Render and copy. Raises ValueError when no stage has run yet."""
    report = Report(artifacts.base_dir())
    if not report.sections():
        raise ValueError(
            f"nothing to report in {report.directory}: run a stage first (bash speedrun_jax.sh)"
        )
    report.check_writable()
    print(copy(render(report), config.output))


def copy(source: Path, directory: Path) -> Path:
    """Copy report.md at `source` and the pictures beside it into `directory`; the copy's path.

    An earlier report_files/ is replaced, so that no picture of an older report stays behind.
    """
    if directory.resolve() == source.parent.resolve():
        return source
    pictures = directory / "report_files"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".report") as fresh:
        copied = shutil.copytree(source.parent / pictures.name, Path(fresh) / pictures.name)
        shutil.rmtree(pictures, ignore_errors=True)
        copied.rename(pictures)
    with artifacts.atomic_write(directory / source.name) as file:
        file.write(source.read_text())
    return (directory / source.name).resolve()


if __name__ == "__main__":
    cli.run(main, Config)
