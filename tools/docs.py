"""Generated text of the documents: the settings, the table and the pages of methods, their number, the site's list of pages.

    python tools/docs.py            # rewrite every block
    python tools/docs.py --check    # name the stale blocks; exit status 1 if there is one

A block lies between `<!-- generated: NAME -->` and `<!-- end -->`: both on lines of their own (also behind the `#` of a
YAML comment), or both within one line. `BLOCKS` makes the text of each NAME; a NAME that it does not hold is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# All that this tool takes from the package.
from unift.commands.methods import rows as family_rows
from unift.commands.methods import table as family_table
from unift.config import words
from unift.config.packaged import preset_names
from unift.config.resolve import resolve
from unift.config.sections import Config
from unift.config.stages import stages

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "mkdocs.yml")

# ---------------------------------------------------------------------------------------------- settings

TYPES: Mapping[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null",
    list: "list", dict: "mapping", tuple: "pair", Any: "any",
}  # fmt: skip
BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting holds, also where it may be null or is a list of them."""
    for part in get_args(annotation) or (annotation,):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _values(annotation: Any) -> str:
    """What a setting takes, in words."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is Annotated:
        return _values(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_values(part) for part in get_args(annotation))
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "mapping"
    if kind is list and (parts := get_args(annotation)):
        inner = parts[0]
        return f"list of {_values(inner)}" if get_origin(inner) is Literal else "list"
    if kind not in TYPES:
        raise SystemExit(f"docs.py: no words for a setting of type {annotation!r}; add them to TYPES")
    return TYPES[kind]


def _yaml(value: Any) -> str:
    """A default as one would write it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else "{}" if value == {} else str(value)


def _setting(name: str, field: FieldInfo) -> str:
    bounds = [f", {sign} {getattr(m, b):g}" for m in field.metadata for b, sign in BOUNDS if hasattr(m, b)]
    default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    text = (field.description or "").replace("<", "&lt;").replace("|", "\\|")
    return f"| `{name}` | {_values(field.annotation)}{''.join(bounds)} | {default} | {text} |"


def settings_table(section: type[BaseModel], prefix: str = "") -> str:
    """A section's docstring and its keys; mappings inside it follow in tables of their own. The sections that have a block
    of their own are left out, of a config and of its phases."""
    own = sections().values()
    fields = {name: field for name, field in section.model_fields.items() if _nested(field.annotation) not in own}
    inner = {name: part for name, field in fields.items() if (part := _nested(field.annotation))}
    text = (section.__dict__.get("__doc__") or "").strip()
    lines = [text, ""] if text else []
    lines += ["| key | value | default | |", "|---|---|---|---|"]
    lines += [_setting(prefix + name, field) for name, field in fields.items()]
    return "\n\n".join(["\n".join(lines), *(settings_table(part, f"{prefix}{name}.") for name, part in inner.items())])


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a config by name; `phases` is a list and has none of its own."""
    return {name: part for name, f in Config.model_fields.items() if isinstance(f.annotation, type)
            and (part := _nested(f.annotation))}  # fmt: skip


# ---------------------------------------------------------------------------------------------- methods

CORE = ("sft", "rft", "sft-rft", "r3", "stage", "uft", "uft-paper")
KINDS = (
    "hints and a reward",
    "a reward",
    "solutions",
    "own completions as data",
    "solutions and a reward at once",
    "preferences and contrast",
    "one after the other",
)


def kind(method: str) -> str:
    """The one of KINDS that a preset is, read off its settings."""
    phases = [stage.rules for stage in stages(resolve(method, overrides={"data": {"task": "lock"}}))]
    if any(words.TOKENS[s.likelihood.tokens].own for s in phases):
        return "own completions as data"
    if len(phases) > 1:
        return "one after the other"
    s = phases[0]
    if words.LOSSES[s.policy.loss].sequences or words.BASELINES[s.credit.baseline].solution:
        return "preferences and contrast"
    if not s.sample.completions:
        return "solutions"
    if words.SCHEDULES[s.show.schedule].graded:
        return "hints and a reward"
    demo = s.sample.demonstration or words.TOKENS[s.likelihood.tokens].demo
    return "solutions and a reward at once" if demo else "a reward"


def by_kind() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {name: [] for name in KINDS}
    for method in preset_names():
        groups[kind(method)].append(method)
    return groups


def method_pages() -> str:
    lines = [f"- {name}: " + ", ".join(f"[{m}](methods/{m}.md)" for m in ms) for name, ms in by_kind().items()]
    wrap = partial(textwrap.fill, width=120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap, lines))


def method_nav() -> str:
    """The site's menu, below `nav:` / `- Methods:`."""
    lines: list[str] = []
    for name, methods in by_kind().items():
        lines.append(f"      - {name[0].upper()}{name[1:]}:")
        lines += [f"          - {m}: methods/{m}.md" for m in methods]
    return "\n".join(lines)


def vocabulary() -> str:
    """Every word that has a text or a source, below the settings that take it."""
    users: dict[tuple[Any, ...], list[str]] = {}
    for name, part in sections().items():
        for key, field in part.model_fields.items():
            if get_origin(field.annotation) is Literal:
                users.setdefault(get_args(field.annotation), []).append(f"`{name}.{key}`")
    lines = ["| setting | word | says | source |", "|---|---|---|---|"]
    for entries in vars(words).values():
        if not (isinstance(entries, Mapping) and all(isinstance(word, words.Word) for word in entries.values())):
            continue
        setting = ", ".join(users.get(tuple(entries), ()))
        for name, word in entries.items():
            text = re.sub(r"\{(\w+)[^}]*\}", r"*\1*", word.text.strip(" ,"))
            if setting and (word.source or text not in ("", name)):
                lines.append(f"| {setting} | `{name}` | {text if text != name else ''} | {word.source} |")
    return "\n".join(lines)


def core_table() -> str:
    """The methods that the README names: what each shows, samples, credits and how solutions push."""
    found = {row[0]: row for row in family_rows()}
    lines = ["| preset | shown | sampled | credit | likelihood |", "|---|---|---|---|---|"]
    for name in CORE:
        for label in [x for x in found if x == name or x.startswith(f"{name}, phase")]:
            _, shown, sampled, credit, _, likelihood, _ = found[label]
            lines.append(f"| `{name}`{label[len(name) :]} | {shown} | {sampled} | {credit} | {likelihood} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- blocks

BLOCKS: dict[str, Callable[[], str]] = {
    "methods count": lambda: str(len(preset_names())),
    "methods core": core_table,
    "methods nav": method_nav,
    "methods pages": method_pages,
    "methods table": family_table,
    "methods words": vocabulary,
    "settings top": lambda: settings_table(Config),
    **{f"settings {name}": lambda part=part, name=name: settings_table(part, f"{name}.") for name, part in sections().items()},
}  # fmt: skip

BEGIN, END = r"<!-- generated: (?P<name>[^>]+?) -->", r"<!-- end -->"
LINES = re.compile(rf"^(?P<head>(?P<lead>[ #]*){BEGIN}\n)(?P<body>.*?)(?P<tail>^(?P=lead){END}$)", re.M | re.S)
WITHIN = re.compile(rf"(?P<head>{BEGIN})(?P<body>[^\n]*?)(?P<tail>{END})")


def rewritten(text: str) -> tuple[str, list[str], list[str]]:
    """The document with every block made anew, the names of its blocks, and of those that were stale.

    Raises SystemExit for a block of unknown name or without its end.
    """
    names: list[str] = []
    stale: list[str] = []

    def new(match: re.Match[str], newline: str) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise SystemExit(f"docs.py: no block is called {name!r}. Known: {', '.join(sorted(BLOCKS))}")
        body = BLOCKS[name]() + newline
        names.append(name)
        if body != match["body"]:
            stale.append(name)
        return match["head"] + body + match["tail"]

    text = LINES.sub(lambda m: new(m, "\n"), text)
    text = WITHIN.sub(lambda m: new(m, ""), text)
    if len(names) != len(re.findall(BEGIN, text)):
        raise SystemExit(f"docs.py: a generated block has no `<!-- end -->`; complete are {', '.join(names) or 'none'}")
    return text, names, stale


def documents(root: Path = ROOT) -> list[Path]:
    return [p for p in (*(root / name for name in DOCUMENTS), *sorted((root / "docs").rglob("*.md"))) if p.is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a block is stale")
    check = parser.parse_args().check
    found = []
    for path in documents():
        old = path.read_text(encoding="utf-8")
        text, _, stale = rewritten(old)
        found += [f"{path.relative_to(ROOT)}: {name}" for name in stale]
        if stale and not check:
            path.write_text(text, encoding="utf-8")
    print("\n".join(found) or "nothing is stale")
    if check and found:
        sys.exit("run `make docs-text`")


if __name__ == "__main__":
    main()
