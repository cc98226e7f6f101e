"""Links of the documents, offline: files and anchors exist, and the site's menu holds every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted((ROOT / ".github").rglob("*.md"))]


def prose(text: str) -> str:
    """Without fenced and inline code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(text)) + re.findall(
        r"(?:href|src)=\"([^\"]+)\"", prose(text)
    )


def anchors(text: str) -> set[str]:
    """Of headings as GitHub and the site make them, and of ``<a id=...>``."""
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for title in re.findall(
        r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    ):
        name, seen = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-"), 0
        while (f"{name}-{seen}" if seen else name) in found:
            seen += 1
        found.add(f"{name}-{seen}" if seen else name)
    return found


def broken(document: Path, root: Path = ROOT) -> list[str]:
    """The links of a document that lead nowhere. A page of docs/ may link to pages of docs/ only: the site has no others."""
    found = []
    for link in links(document.read_text(encoding="utf-8")):
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        inside = not document.is_relative_to(root / "docs") or target.is_relative_to(root / "docs")
        good = target.exists() and inside
        if good and anchor:
            good = target.suffix == ".md" and anchor in anchors(target.read_text(encoding="utf-8"))
        if not good:
            found.append(f"{document.name}: {link}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links(document):
    assert not broken(document)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Read me\n\n[x](docs/a.md#two-words), [y](docs/b.md)\n")
    page = tmp_path / "docs" / "a.md"
    page.write_text(
        '# A\n## Two words\n## Two words\n<a id="v1"></a>\n[a](#two-words-1) [b](#v1) [c](a.md) [d](https://example.org)\n'
        "[e](#no) [f](b.md) [g](../README.md) ![h](h.png) `[code](c.md)`\n```\n[code](c.md)\n## Not a title\n```\n[i](#not-a-title)\n"
    )
    assert broken(page, tmp_path) == [f"a.md: {x}" for x in ("#no", "b.md", "../README.md", "h.png", "#not-a-title")]
    assert broken(tmp_path / "README.md", tmp_path) == ["README.md: docs/b.md"]


def test_the_menu_holds_every_page():
    def pages(node):
        if isinstance(node, str):
            return [node]
        return [page for part in (node.values() if isinstance(node, dict) else node) for page in pages(part)]

    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
