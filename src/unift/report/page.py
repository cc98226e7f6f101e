"""One run as a page."""

from __future__ import annotations

from unift._version import __version__
from unift.report import browser, sections, words
from unift.report.gather import RunData
from unift.report.markup import Content, Html, document, tag


def run_page(run: RunData) -> str:
    parts: list[tuple[str, str, list[Html | None]]] = [
        ("numbers", "What came out", [sections.cards(run), sections.accuracies(run), sections.readings(run)]),
        ("learning", "Learning", [sections.grid(sections.learning_charts(run))]),
        ("updates", "Updates", [sections.grid(sections.update_charts(run))]),
        ("speed", "Speed", [sections.time_bar(run), sections.grid(sections.speed_charts(run))]),
        ("rollouts", "Rollouts", [browser.rollouts(run) or _no_rollouts(run)]),
        ("settings", "Settings", [sections.settings_tables(run)]),
        ("environment", "Environment", [sections.environment_table(run)]),
    ]
    parts = [(anchor, title, content) for anchor, title, content in parts if any(content)]
    links = tag("nav", [tag("a", title, href=f"#{anchor}") for anchor, title, _ in parts])
    blocks = [tag("section", tag("h2", title), content, id=anchor) for anchor, title, content in parts]
    return document(words.title(run), sections.header(run), links, blocks, footer(run.name, run.remarks))


def footer(name: str, remarks: Content) -> Html:
    listed = [tag("p", remark) for remark in remarks or []]
    about = f"unift {__version__}, run folder {name}. This file needs no network and runs no script."
    return tag("footer", listed, tag("p", about))


def _no_rollouts(run: RunData) -> Html | None:
    sampled = any("reward" in m for m in run.metrics)
    why = "This run stored no rollouts. With save.rollouts=true a run keeps what was sampled, and a sample of it stands here."
    return tag("p", why, cls="note") if sampled else None
