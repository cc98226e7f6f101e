"""Generated text of the documents: settings, methods, their pages and number, the site's list of pages, lines of equations.

    python tools/docs.py            # rewrite every block
    python tools/docs.py --check    # name the stale blocks; exit status 1 if there is one

A block lies between `<!-- generated: NAME -->` and `<!-- end -->`: both on lines of their own (also behind the `#` of a
YAML comment), or both within one line. `BLOCKS` makes the text of each NAME; a NAME that it does not hold is an error.
"""

from __future__ import annotations

import argparse
import ast
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
from unift.commands.doctor import sizes, throughput
from unift.commands.methods import rows as family_rows
from unift.commands.methods import table as family_table
from unift.config import words
from unift.config.packaged import preset_names
from unift.config.resolve import read_yaml, resolve
from unift.config.sections import Config
from unift.config.stages import stages

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "unift"
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


# ---------------------------------------------------------------------------------------------- recipes

CLUSTER = ROOT / "examples" / "cluster"
PLACES = {
    "one_node.yaml": (6, 80),
    "two_nodes.yaml": (14, 80),
    "lora_24gb.yaml": (1, 24),
}  # processes that train, GB a card


def cluster_recipes() -> dict[str, tuple[Config, int, int]]:
    """The settings files of examples/cluster, with the processes and cards that they are written for."""
    files = sorted(path for path in CLUSTER.glob("*.yaml") if not path.name.startswith("accelerate"))
    return {path.name: (resolve(None, file=read_yaml(path)), *PLACES.get(path.name, (1, 80))) for path in files}


# ---------------------------------------------------------------------------------------------- equations

# (equation, file, function or "" for the head of the file, words of its docstring that name the source)
EQUATIONS = (
    ("L: a sum of token streams, each over its Z", "objectives/loss.py", "", "UFT, arXiv 2505.16984, eq. 3.3"),
    ("1/Z, counted over the whole optimizer batch", "objectives/weights.py", "", "UFT, arXiv 2505.16984, eq. 3.3"),
    ("Z of the official code: means over micro-batches", "objectives/weights.py", "_by_microbatch", "official code of UFT"),
    ("p(t), the chance that a cut is shown", "hints/schedules.py", "cosine", "UFT, eq. B.1"),
    ("sep[k] = round(k S / num), where a hint of k cuts ends", "rows/tokens.py", "separators", "UFT section B"),
    ("A = (r - mean) / (std + eps): GRPO, Dr.GRPO, RLOO", "credit/advantages.py", "advantages", "GRPO, arXiv 2402.03300"),
    ("penalty on length", "credit/advantages.py", "overlong", "arXiv 2503.14476, eq. 13"),
    ("min(rho A, clip(rho, 1 - low, 1 + high) A), dual clip", "objectives/loss.py", "clipped_surrogate", "arXiv 1707.06347, eq. 7"),
    ("A l, without a ratio", "objectives/loss.py", "reinforce", "Williams 1992"),
    ("sg(clip(rho)) A l: CISPO", "objectives/loss.py", "clipped_importance", "arXiv 2506.13585"),
    ("s A, s the ratio of a whole sequence: GSPO", "objectives/loss.py", "sequence_ratio", "arXiv 2507.18071, eq. 5"),
    ("KL towards the reference: k2, k3", "objectives/loss.py", "kl_penalty", "Schulman's estimators"),
    ("A_t = sum_k (gamma lambda)^k delta_{t+k}: GAE", "credit/returns.py", "gae", "arXiv 1506.02438, eq. 16"),
    ("(A - mean) / std over all tokens of a step", "credit/returns.py", "whitened", "REINFORCE++, arXiv 2501.03262"),
    ("KL inside the reward, by baseline", "credit/returns.py", "spread", "ReFT, arXiv 2401.08967"),
    ("max((V - R)^2, (V_clip - R)^2)", "objectives/loss.py", "value_loss", "PPO's code"),
    ("-log sigmoid(r - r'): DPO, UNA", "objectives/loss.py", "sequence_loss", "DPO, arXiv 2305.18290, eq. 7"),
    ("log(p / (1 - p)), in the place of r: ORPO", "objectives/loss.py", "log_odds", "ORPO, arXiv 2403.07691, eqs. 3 and 4"),
    ("a solution against other answers", "credit/discriminative.py", "", "arXiv 2502.18679"),
    ("pi l: DFT", "objectives/likelihood.py", "probability", "arXiv 2508.05629 eq. 9"),
    ("pi (1 - pi) l: CHORD", "objectives/likelihood.py", "uncertainty", "arXiv 2508.11408"),
    ("pi / max(pi, alpha) l: TrSFT", "objectives/likelihood.py", "trust", "arXiv 2512.17636"),
    ("pi / (pi + gamma): LUFFY", "objectives/likelihood.py", "shaped", "arXiv 2504.14945"),
    ("min(rho, 1 + clip): PSFT", "objectives/likelihood.py", "ratio", "arXiv 2508.17784"),
    ("min(exp(l - l_ref), clip) l: iw-SFT", "objectives/likelihood.py", "importance", "arXiv 2507.12856"),
    ("discounted sum of the losses that follow: IFT", "objectives/likelihood.py", "tail", "arXiv 2405.11870"),
    ("noise on input embeddings: NEFTune, R-SFLLM", "objectives/input_noise.py", "noise", "NEFTune, arXiv 2310.05914"),
    ("eps g / norm(g), the worst direction", "objectives/input_noise.py", "worst_case", "arXiv 1605.07725, eq. 5"),
    ("own guesses as inputs: IFT", "objectives/input_noise.py", "own_guesses", "arXiv 2405.11870 eq. 17"),
    ("pass@k = 1 - C(n - c, k) / C(n, k)", "training/evaluate.py", "pass_at_k", "arXiv 2107.03374, eq. 1"),
)  # fmt: skip


def definitions(file: Path) -> dict[str, tuple[int, str]]:
    """(line, docstring) of every function, class and constant of a module, also below a class as ``Class.name``; of the file
    itself as ""."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {"": (1, ast.get_docstring(tree) or "")}

    def see(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node.lineno, ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                see(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update({prefix + t.id: (node.lineno, "") for t in targets if isinstance(t, ast.Name)})

    see(tree.body, "")
    return found


def equations() -> str:
    """Where each equation is computed, with its line."""
    lines = ["| equation | file and line | function | source |", "|---|---|---|---|"]
    for equation, file, name, source in EQUATIONS:
        line, _ = definitions(SOURCE / file)[name]
        function = f"`{name}`" if name else "the head of the file"
        lines.append(f"| {equation} | `{file}:{line}` | {function} | {source} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- blocks

BLOCKS: dict[str, Callable[[], str]] = {
    "equations": equations,
    "memory table": sizes.table,
    "methods count": lambda: str(len(preset_names())),
    "methods core": core_table,
    "methods nav": method_nav,
    "methods pages": method_pages,
    "methods table": family_table,
    "methods words": vocabulary,
    "recipes table": lambda: sizes.recipes(cluster_recipes()),
    "throughput assumptions": throughput.assumptions,
    "throughput table": throughput.table,
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
