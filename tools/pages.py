"""What a tool writes into a page of the documentation: a block between two markers, each on a line of its own."""

from __future__ import annotations

from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->"


def put(page: Path, name: str, body: str) -> None:
    """``body`` between the page's markers of this name. Raises ValueError where the page has none."""
    (begin, end), text = markers(name), page.read_text(encoding="utf-8")
    page.write_text(text[: text.index(begin) + len(begin)] + body + "\n" + text[text.index(end) :], encoding="utf-8")
