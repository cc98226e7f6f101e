"""One method with one setting changed at a time: which runs that takes, and their table and figure.

`unift compare --vary KEY=V1,V2`, once or more. Every value is an arm of its own; the run as it stands is the first arm and
serves every key. Keys that only make sense together move together: ``--vary "A=1,2; B=9,8"`` is A=1 with B=9, then A=2 with B=8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unift.commands.compare.table import Result, accuracy_of, by_method, tokens
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.config.sections import Config

COLUMNS = 4  # of the figure's panels


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed. ``name``: of their folders and in tables. ``key``, ``value``: what is changed;
    empty for the method as it stands."""

    method: str
    name: str
    key: str = ""
    value: str = ""
    settings: tuple[str, ...] = ()  # key=value words


def values_of(text: str) -> list[str]:
    """Texts between commas, those within brackets and quotes left alone."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return [value.strip() for value in found]


def _moved(text: str) -> list[tuple[str, list[str]]]:
    """(key, values) of the keys of one ``--vary``; all have as many values."""
    pairs: list[tuple[str, list[str]]] = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        key, sign, listed = part.partition("=")
        values = values_of(listed)
        if not sign or not key.strip() or not all(values):
            raise ConfigError(f"--vary {part!r}: expected KEY=VALUE,VALUE,... as in show.cuts=1,2,5")
        pairs.append((key.strip(), values))
    if not pairs:
        raise ConfigError(f"--vary {text!r}: expected KEY=VALUE,VALUE,... as in show.cuts=1,2,5")
    counts = {key: len(values) for key, values in pairs}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"--vary: keys that move together need as many values each, found {counts}")
    return pairs


def arms(methods: Sequence[str], varied: Sequence[str]) -> list[Arm]:
    """The methods as they stand, each followed by an arm a value. Raises ConfigError for what cannot be read."""
    moved = [_moved(text) for text in varied]
    found: list[Arm] = []
    for method in methods:
        found.append(Arm(method, method))
        for pairs in moved:
            key = pairs[0][0]
            for values in zip(*(values for _, values in pairs), strict=True):
                words = tuple(f"{name}={value}" for (name, _), value in zip(pairs, values, strict=True))
                name = re.sub(r"[^\w.=+-]+", "_", f"{method}-{key}={values[0]}")
                found.append(Arm(method, name, key, values[0], words))
    names = [arm.name for arm in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--vary: these are there twice: {', '.join(twice)}")
    return found


def without_copies(found: Sequence[Arm], configs: Mapping[str, Config]) -> list[Arm]:
    """The arms without those whose value is the one that their method has anyway. ``configs``: by the arms' names."""
    return [arm for arm in found if not arm.key or configs[arm.name] != configs[arm.method]]


def value_in(config: Config, key: str) -> str:
    """What a run without changes has there, as YAML would write it."""
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return str(node).lower() if isinstance(node, bool) or node is None else str(node)


# ---------------------------------------------------------------------------------------------- what came out

Line = tuple[str, bool, list[Result]]  # value, whether it is the method's own, runs


def panels(found: Sequence[Arm], configs: Mapping[str, Config], results: Sequence[Result]) -> dict[str, list[Line]]:
    """By the key (behind its method, where there are several): a line a value, those that are numbers in ascending order."""
    runs = by_method(results)
    several = len({arm.method for arm in found}) > 1
    groups: dict[str, list[Line]] = {}
    for arm in found:
        if not arm.key:
            continue
        title = f"{arm.method} {arm.key}" if several else arm.key
        if title not in groups:
            own = value_in(configs[arm.method], arm.key)
            groups[title] = [(own, True, runs[arm.method])] if arm.method in runs else []
        if arm.name in runs:
            groups[title].append((arm.value, False, runs[arm.name]))
    for lines in groups.values():
        if all(_number(value) is not None for value, _, _ in lines):
            lines.sort(key=lambda line: float(line[0]))
    return groups


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _against(runs: Sequence[Result], own: Sequence[Result]) -> str:
    """Points ahead of the unchanged method, and whether the intervals are apart."""
    (a, a_low, a_high), (b, b_low, b_high) = accuracy_of(runs), accuracy_of(own)
    apart = a_low > b_high or a_high < b_low
    return f"{100 * (a - b):+.1f}{', apart' if apart else ''}"


def table(groups: Mapping[str, Sequence[Line]]) -> str:
    """Markdown: a line a value; accuracy in % on held-out rows without hints, 95 % intervals as in `compare.table`."""
    lines = [
        "| setting | value | held-out % | 95 % interval | each seed | against the unchanged | tokens sampled | tokens trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, values in groups.items():
        own = next((runs for _, unchanged, runs in values if unchanged), None)
        for value, unchanged, runs in values:
            accuracy, low, high = accuracy_of(runs)
            each = " ".join(f"{100 * r['test']['accuracy']:.1f}" for r in runs)
            against = "unchanged" if unchanged else _against(runs, own) if own else "-"
            lines.append(
                f"| {title} | {value} | {100 * accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f} | {each} | {against} "
                f"| {tokens(runs, 'tokens_sampled')} | {tokens(runs, 'tokens_trained')} |"
            )
    return "\n".join(lines)


def figure(groups: Mapping[str, Sequence[Line]], path: Path) -> None:
    """A panel a key: mean and 95 % interval of every value, a dot a seed, the unchanged method in orange."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(groups), COLUMNS)
    rows = -(-len(groups) // columns)
    drawn, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.2 * rows), squeeze=False, sharey=True, constrained_layout=True
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (title, values) in zip(axes.flat, groups.items(), strict=False):
        for x, (_, unchanged, runs) in enumerate(values):
            mean, low, high = (100 * v for v in accuracy_of(runs))
            colour = "#D55E00" if unchanged else "#0072B2"
            axis.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", color=colour, capsize=4, zorder=3)
            each = [100 * r["test"]["accuracy"] for r in runs]
            axis.plot([x + 0.18] * len(each), each, ".", color=colour, alpha=0.5, ms=5)
        axis.set_xticks(range(len(values)), [value for value, _, _ in values])
        axis.set(title=title, ylim=(-4, 104), xlim=(-0.5, len(values) - 0.3))
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    for line in axes:
        line[0].set_ylabel("held-out accuracy, %")
    temporary = path.with_name(f".{path.name}")
    drawn.savefig(temporary, dpi=100)
    plt.close(drawn)
    os.replace(temporary, path)
