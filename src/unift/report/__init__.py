"""``unift report``: what a run did, as one HTML file that needs nothing else: no network, no scripts, no other files."""

from __future__ import annotations

from pathlib import Path

from unift.types import UniftError

__all__ = ["write"]


def write(source: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder, finished or not, or of a folder of runs (``unift compare``, the demo).

    Default place: ``report.html`` in the folder. Nothing else in the folder is touched. Returns the file's path.
    Raises UniftError if the folder holds no run, or its files cannot be read or written.
    """
    from unift.checkpoint import write_atomic
    from unift.report import gather

    runs = gather.run_folders(source)
    out = out or source / "report.html"
    if out.is_dir():
        raise UniftError(f"--out: {out} is a folder, expected the name of a file, e.g. {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UniftError(f"--out: the folder {out.parent} does not exist. Make it first, or name another place")
    if (source / gather.CONFIG).is_file():
        from unift.report.page import run_page

        page = run_page(gather.read_run(source))
    else:
        from unift.report.comparison import comparison_page

        page = comparison_page(
            source.name or source.resolve().name, [gather.read_run(folder, 2, 2, 3) for folder in runs]
        )
    write_atomic(out, page)
    return out
