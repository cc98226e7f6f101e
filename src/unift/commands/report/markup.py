"""HTML that is safe by construction: text is escaped unless a function of this file, or a chart, made it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources

from unift._version import __version__


class Html(str):
    """Markup. Any other ``str`` is text and gets escaped, in content as in attributes."""


Content = str | Iterable["Content"] | None


def render(content: Content) -> Html:
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(printable(content)))
    return Html("".join(render(part) for part in content))


def printable(text: str) -> str:
    """``text`` with what no HTML file can hold, or a browser would not show, written out: NUL, controls, lone surrogates,
    and the marks that reverse the direction of a line (model output could hide its own text with them)."""
    return "".join(f"\\u{ord(c):04x}" if _hidden(c) else c for c in text)


def _hidden(c: str) -> bool:
    code = ord(c)
    control = (code < 32 and c not in "\n\t") or 127 <= code < 160
    return control or 0xD800 <= code <= 0xDFFF or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def tag(name: str, *content: Content, **attributes: str | bool | None) -> Html:
    """``tag("p", "a < b", cls="note")`` -> ``<p class="note">a &lt; b</p>``. A True attribute stands alone."""
    opened = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = {"cls": "class"}.get(key, key.replace("_", "-"))
        opened += f" {key}" if value is True else f' {key}="{html.escape(printable(str(value)))}"'
    return Html(f"<{opened}>{render(content)}</{name}>")


def table(
    head: Sequence[Content], rows: Iterable[Sequence[Content]], numeric: Sequence[int] = (), cls: str = ""
) -> Html:
    """``numeric``: columns set to the right. Wide tables scroll in their own box."""

    def cells(kind: str, row: Sequence[Content]) -> list[Html]:
        return [tag(kind, cell, cls="number" if i in numeric else None) for i, cell in enumerate(row)]

    body = [tag("tr", cells("td", row)) for row in rows]
    parts = [tag("thead", tag("tr", cells("th", head))), tag("tbody", body)]
    return tag("div", tag("table", parts, cls=cls or None), cls="scroll")


def fold(summary: Content, *content: Content, opened: bool = False, cls: str = "") -> Html:
    return tag("details", tag("summary", summary), *content, open=opened, cls=cls or None)


def document(title: str, *content: Content) -> str:
    """The whole page. The policy in its head forbids scripts and every request, whatever the text on it holds."""
    style = (resources.files("unift.commands.report") / "style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", tag("main", *content)), lang="en") + "\n"


def footer(name: str, remarks: Content) -> Html:
    listed = [tag("p", remark) for remark in remarks or []]
    about = f"unift {__version__}, run folder {name}. This file needs no network and runs no script."
    return tag("footer", listed, tag("p", about))
