"""``unift report``: what a run did, as one HTML file that needs nothing else: no network, no scripts, no other files."""

from __future__ import annotations

from pathlib import Path

from unift.commands.report import cards, sections, words
from unift.commands.report.gather import RunData
from unift.commands.report.markup import Html, document, footer, tag
from unift.types import UniftError


def write(source: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder, finished or not, or of a folder of runs (``unift compare``, the demo).

    Default place: ``report.html`` in the folder. Nothing else in the folder is touched. Returns the file's path.
    Raises UniftError if the folder holds no run, or its files cannot be read or written.
    """
    from unift.commands.report.gather import CONFIG, read_run, run_folders
    from unift.files import write_atomic

    runs = run_folders(source)
    out = out or source / "report.html"
    if out.is_dir():
        raise UniftError(f"--out: {out} is a folder, expected the name of a file, e.g. {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UniftError(f"--out: the folder {out.parent} does not exist. Make it first, or name another place")
    if (source / CONFIG).is_file():
        page = run_page(read_run(source))
    else:
        from unift.commands.report.comparison import comparison_page

        page = comparison_page(source.name or source.resolve().name, [read_run(folder, 2, 2, 3) for folder in runs])
    write_atomic(out, page)
    return out


def brief(folder: Path) -> list[str]:
    """What holds a run back and what to try, for a terminal: a line a cause, none where its numbers show nothing. Failed scores
    are left to the summary, which counts them."""
    from unift.commands.report.diagnosis import causes
    from unift.commands.report.gather import read_run

    found = causes(read_run(folder, steps=0))
    return [f"{cause.text} {cause.advice}" for cause in found if cause.name != "reward errors"]


def run_page(run: RunData) -> str:
    parts: list[tuple[str, str, list[Html | None]]] = [
        ("short", "In short", [sections.diagnosis(run)]),
        ("numbers", "What came out", [sections.cards(run), sections.accuracies(run), sections.more(run)]),
        ("learning", "Learning", [sections.grid(sections.learning_charts(run))]),
        ("updates", "Updates", [sections.grid(sections.update_charts(run))]),
        ("speed", "Speed", [sections.time_bar(run), sections.grid(sections.speed_charts(run))]),
        ("rollouts", "Rollouts", [cards.rollouts(run) or _no_rollouts(run)]),
        ("settings", "Settings", [sections.settings_tables(run)]),
        ("environment", "Environment", [sections.environment_table(run)]),
    ]
    parts = [(anchor, title, content) for anchor, title, content in parts if any(content)]
    links = tag("nav", [tag("a", title, href=f"#{anchor}") for anchor, title, _ in parts])
    blocks = [tag("section", tag("h2", title), content, id=anchor) for anchor, title, content in parts]
    return document(words.title(run), sections.header(run), links, blocks, footer(run.name, run.remarks))


def _no_rollouts(run: RunData) -> Html | None:
    sampled = any("reward" in m for m in run.metrics)
    why = "This run stored no rollouts. With save.rollouts=true a run keeps what was sampled, and a sample of it stands here."
    return tag("p", why, cls="note") if sampled else None
