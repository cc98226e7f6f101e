"""Write the tables of docs/performance.md from benchmarks/results/*.json, between its markers.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results", ROOT.parent / "docs" / "performance.md"
SIDES = ("unift", "trl", "trl-checkpointing")
ORDER = ["short", "countdown", "knights", "math", "smollm2"]


def read(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) if rows else "No result is kept yet."


def span(s: dict[str, Any], digits: int = 2) -> str:
    return f"{s['median']:.{digits}f} [{s['min']:.{digits}f}, {s['max']:.{digits}f}]"


def on(device: str, pattern: str) -> list[dict[str, Any]]:
    return [r for r in read(pattern) if r.get("device", "cpu") == device]


def vs_trl() -> str:
    rows = []
    records = on("cpu", "vs_trl-*")
    records.sort(key=lambda r: (len(r["model"]), ORDER.index(r["shape"]), r["trl_gradient_checkpointing"]))
    for r in records:
        s = r["sizes"]
        rows.append(
            [
                f"{r['model']} {r['shape']}" + (", bfloat16" if r.get("precision") == "bfloat16" else ""),
                f"{s['groups']} x {s['g']} x ({s['prefix']} + {s['completion']})",
                "on" if r["trl_gradient_checkpointing"] else "off",
                f"**{span(r['ratio_cpu'])}**",
                span(r["ratio"]),
                f"{r['trl']['cpu']['median']:.2f} / {r['unift']['cpu']['median']:.2f}",
                str(r["ratio"]["n"]),
                f"{r['machine']['threads']}; {r['machine']['load']:.0f}",
            ]
        )
    head = ["model, shape", "groups x G x (prefix + completion)", "TRL checkpointing", "CPU seconds, TRL / unift"]
    return table([*head, "wall clock, TRL / unift", "CPU s a step", "pairs", "threads; load"], rows)


def gpu() -> str:
    """Sampling and update on a GPU beside its limits."""
    rows = [
        [
            f"{record['model']} {record['shape']}",
            r["variant"],
            span(r["seconds"], 3),
            f"{r['tokens_per_second']['median']:,.0f} ({r['of_roofline']:.0%} of {record['roofline_tokens_per_second']:,.0f})",
            f"{r['update']['median']:.3f}",
            f"{r['mfu']:.0%} of {record['tflops']:.0f} TFLOP/s",
            f"{r['gap']:.1e}",
        ]
        for record in sorted(read("gpu-*"), key=lambda r: ORDER.index(r["shape"]))
        for r in record["rows"]
    ]
    head = [
        "shape",
        "unift",
        "s a step",
        "sampled tokens/s (of the roofline)",
        "update, s",
        "its MFU",
        "largest log-prob gap",
    ]
    return table(head, rows)


def gpu_vs_trl() -> str:
    """Seconds are the wall clock's: CPU seconds mean little beside a GPU."""
    rows = [
        [
            f"{r['model']} {r['shape']}",
            f"{s['groups']} x {s['g']} x ({s['prefix']} + {s['completion']})",
            r["precision"],
            f"**{span(r['ratio'])}**",
            f"{span(r['ratio_generate'])}, {span(r['ratio_update'])}",
            f"{r['trl']['seconds']['median']:.2f} / {r['unift']['seconds']['median']:.2f}",
        ]
        for r in on("cuda", "vs_trl-*")
        for s in [r["sizes"]]
    ]
    head = ["model, shape", "groups x G x (prefix + completion)", "products", "TRL / unift", "generating, updating"]
    return table([*head, "s a step"], rows)


def grown(r: dict[str, Any]) -> float:
    """Share saved of what a step adds to a process that has imported everything and loaded the model."""
    ours, theirs = (r[s]["peak_mib"] - r[s]["loaded_mib"] for s in ("unift", "trl"))
    return 1 - ours / theirs


def memory() -> str:
    rows = [
        [
            r["case"] + " on a GPU" * bool(record["machine"].get("gpu")),
            *(f"{r[s]['peak_mib']:,.0f}" for s in SIDES),
            f"{r['saved']:.0%}",
            f"{grown(r):.0%}",
        ]
        for record in read("memory*")
        for r in record["rows"]
    ]
    head = ["case", "unift MiB", "TRL, checkpointing off", "TRL, on (its default)", "below TRL, off"]
    return table([*head, "the same above the loaded model"], rows)


def ablation() -> str:
    rows = [
        [f"{r['machine']['date'][:10]} {title}", row["off"], span(row["ratio_cpu"]), f"{row['forwarded']:.0f}"]
        for path in sorted(RESULTS.glob("ablation-*.json"))
        for r, title in [(json.loads(path.read_text()), path.stem.removeprefix("ablation-"))]
        for row in r["rows"]
    ]
    return table(["run", "switched off", "CPU seconds against all on", "tokens forwarded"], rows)


def drafts() -> str:
    """Sampling with drafts against the same sampling without: a line a place in training, a source and a number of rows."""
    order = ["lock", "3m", "135m"]
    records = sorted(read("drafts-*"), key=lambda r: ([r["name"].startswith(x) for x in order].index(True), r["name"]))
    rows = [
        [
            r["name"],
            f"{r['temperature']:g}",
            f"{100 * x['share']:.0f}",
            str(x["rows"]),
            f"{x['length']:.0f}",
            x["source"],
            f"**{span(x['speed_cpu'])}**",
            f"{100 * x['accepted']:.0f}",
            f"{x['plain_forwards']} / {x['forwards']}",
            f"{x['forwarded'] / x['plain_forwarded']:.2f}",
            f"{x['equal'][0]} of {x['equal'][1]}",
        ]
        for r in records
        for x in r["rows"]
    ]
    head = ["model and stage", "temperature", "hint %", "rows", "tokens a row", "sample.draft", "times as fast (CPU s)"]
    return table([*head, "accepted %", "forwards, without / with", "tokens forwarded, of those without", "equal"], rows)


def versions() -> str:
    """A recipe by two versions, alternating."""
    rows = [
        [
            f"{r['recipe']} {name}",
            f"{r['commits']['before']} / {r['commits']['now']}",
            f"**{span(m['ratio'])}**",
            f"{m['before']['median']:.1f} / {m['now']['median']:.1f}",
            str(m["ratio"]["n"]),
        ]
        for r in read("versions-*")
        for name, m in r["methods"].items()
    ]
    return table(["recipe, method", "versions", "times as fast (CPU s)", "CPU s, before / now", "pairs"], rows)


def precision() -> str:
    rows = [
        [
            f"{path.stem.removeprefix('precision-')}",
            row["variant"],
            span(row["ratio_cpu"]),
            f"{row['cpu']['median']:.2f}",
            f"{row['gap']['max']:.1e}",
            str(row["cpu"]["n"]),
        ]
        for path in sorted(RESULTS.glob("precision-*.json"))
        for row in json.loads(path.read_text())["rows"]
    ]
    head = ["run", "products", "times as fast as float32 (CPU s)", "CPU s a step", "largest log-prob gap"]
    return table([*head, "steps"], rows)


def scaling() -> str:
    rows = []
    for record in read("scaling"):
        for name, table_rows in record["tables"].items():
            for r in table_rows:
                cells = [f"{name} = {r[name]}", span(r["cpu"], 3), f"{r['shared_tokens']}", f"{r['plain_tokens']}"]
                rows.append(cells)
    return table(["changed", "CPU s a step", "tokens forwarded", "tokens of copies"], rows)


def estimate() -> str:
    rows = []
    for record in read("estimate"):
        for r in record["rows"]:
            z = r["sizes"]
            rows.append(
                [
                    r["model"],
                    f"{z['groups']} x (prompt {z['prefix']} + {z['g']} x {z['completion']})",
                    f"`{r['settings']}`" if r["settings"] else "-",
                    f"{r['peak_mib']:,.0f}",
                    f"{r['estimate_mib']:,.0f}",
                    f"{r['estimate_mib'] / r['peak_mib']:.2f}",
                ]
            )
    return table(["model", "tokens", "settings", "measured, MiB", "estimated, MiB", "ratio"], rows)


def long() -> str:
    rows = [
        [
            f"{r['completion']:,}",
            r.get("how", "one forward"),
            f"{r['cpu']:.0f}",
            f"{r['peak_mib'] / 1024:.2f}",
            f"{r['forwarded']:,.0f}",
        ]
        for record in read("long")
        for r in [*record["lengths"], *({"completion": record["base"]["completion"]} | b for b in record["budgets"])]
    ]
    return table(["tokens of a completion", "how", "CPU s a step", "peak, GiB", "tokens forwarded"], rows)


def roofline() -> str:
    measured = {(r["model"], r["shape"]): r for r in on("cpu", "vs_trl-*") if not r["trl_gradient_checkpointing"]}
    rows = []
    for record in read("roofline"):
        for r in record["rows"]:
            m = measured.get((r["model"], r["shape"]))
            ours, theirs = (m[s]["cpu"]["median"] if m else None for s in ("unift", "trl"))
            rows.append(
                [
                    f"{r['model']} {r['shape']}",
                    f"{r['generate']:.2f} + {r['train']:.2f} = {r['floor']:.2f}",
                    f"{ours:.2f} ({r['floor'] / ours:.0%})" if ours else "-",
                    f"{r['floor_trl']:.2f}",
                    f"{theirs:.2f} ({r['floor_trl'] / theirs:.0%})" if theirs else "-",
                    f"{theirs / r['floor']:.1f}x" if theirs else "-",
                    f"{ours / (ours - r['saved_bfloat16']):.2f}x" if ours else "-",
                ]
            )
    head = ["model, shape", "unift's products, s", "unift measured (of its floor)", "TRL's products, s", "TRL measured"]
    return table([*head, "most that is possible against this TRL", "most by bfloat16 over our float32"], rows)


def rounding() -> str:
    rows = [
        [record["model"], r["pair"], f"{r['mean']:.1e}", f"{r['max']:.1e}", str(r["n"])]
        for record in read("rounding-*")
        for r in record["rows"]
    ]
    return table(["model", "compared", "mean", "largest", "tokens"], rows)


def machines() -> str:
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        r = json.loads(path.read_text())
        m = r["machine"]
        versions = ", ".join(f"{n} {m[n]}" for n in ("torch", "transformers", "trl") if n in m)
        note, where = f" {r['note']}" if r.get("note") else "", m.get("gpu") or m["cpu"]
        lines.append(
            f"- `{path.name}`: {m['date']}, commit {m['commit']}, {where}, {m['cores']} cores ({m['usable']} used), "
            f"{m['threads']} thread(s), load {m['load']:.1f}, Python {m['python']}, {versions}.{note}"
        )
    return "\n".join(lines)


def rows() -> str:
    cells = [
        [f"{r['rows']:,}", r["kind"], f"{r['seconds']:.1f}", f"{r['cpu']:.1f}", f"{r['mib']:.0f}"]
        for record in read("rows")
        for r in record["rows"]
    ]
    return table(["rows", "start", "wall s", "CPU s", "MiB"], cells)


PAGES = {
    PAGE: (
        vs_trl,
        memory,
        ablation,
        versions,
        drafts,
        scaling,
        roofline,
        precision,
        rounding,
        rows,
        gpu,
        gpu_vs_trl,
        machines,
    ),
    PAGE.with_name("cluster.md"): (estimate, long),
}


def main() -> None:
    for page, makers in PAGES.items():
        text = page.read_text()
        for make in makers:
            name = make.__name__
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
            text, found = pattern.subn(lambda m, make=make: m.group(1) + make() + "\n" + m.group(2), text)
            assert found == 1, f"{page} has no markers for {name}"
        page.write_text(text)
        print(f"tables of {page} written")


if __name__ == "__main__":
    main()
