"""The paper's ablations on a small combination lock: runs, one table and one figure of seven panels for docs/ablations.md.

    python tools/ablations.py FOLDER [--seeds 3] [--workers 1] [--print]

FOLDER gets what three `unift compare --vary` commands leave (uft/, no-likelihood/, sft-rft/), which --print shows instead of
running them. A repeated command runs what is missing; --finished writes the page from the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pages

from unift.commands.compare import Job, run_many, train_job, vary
from unift.commands.compare.table import Result
from unift.config.resolve import parse_overrides, resolve

DOCS = Path(__file__).resolve().parents[1] / "docs"
SMALL = (
    *("data.options.letters=6", "data.options.keys=1", "data.test_rows=300", "sample.max_tokens=12"),
    *("train.steps=100", "train.prompts=16", "reference.kl=0.0", "eval.every=0", "eval.train_rows=0", "save.every=0"),
)


@dataclass(frozen=True)
class Study:
    """One `unift compare --vary`. ``titles``: of the panels, by key."""

    folder: str
    method: str
    titles: Mapping[str, str]
    varied: Sequence[str]
    settings: Sequence[str] = ()


STUDIES = (
    Study("rft", "rft", {}, ()),
    Study(
        "uft",
        "uft",
        {
            "show.cuts": "number of cuts L",
            "show.until": "hinted stretch T_hint",
            "likelihood.weight": "likelihood weight",
            "show.draw": "length law",
            "show.schedule": "hint schedule",
        },
        (
            "show.cuts=1",
            "show.until=0.3,0.9",
            "likelihood.weight=0.001,0.2,0.5",
            "show.draw=two_point",
            "show.schedule=uniform,staircase",
        ),
        ("likelihood.weight=2.0",),
    ),
    Study(
        "no-likelihood",
        "uft",
        {"show.schedule": "hint schedule, no likelihood"},
        ("show.schedule=uniform,staircase",),
        ("likelihood.weight=0.0",),
    ),
    Study(
        "sft-rft",
        "sft-rft",
        {"phases.0.share": "share of SFT in sft-rft"},
        ("phases.0.share=0.1,0.6; phases.1.share=0.9,0.4",),
    ),
)


def jobs_of(study: Study, folder: Path, seeds: int) -> list[Job]:
    """The runs of the study's command, seed by seed."""
    arms = vary.arms([study.method], study.varied)
    settings = [*SMALL, *study.settings]
    return [
        train_job(a.method, seed, "lock", folder / study.folder, [*settings, *a.settings], a.name)
        for seed in range(seeds)
        for a in arms
    ]


def panels_of(study: Study, results: Sequence[Result]) -> dict[str, list[vary.Line]]:
    arms = vary.arms([study.method], study.varied)
    settings = [*SMALL, *study.settings]
    configs = {
        a.name: resolve(a.method, recipe="lock", overrides=parse_overrides([*settings, *a.settings])) for a in arms
    }
    found = vary.panels(arms, configs, results)
    return {study.titles[key]: lines for key, lines in found.items() if lines}


def command(study: Study, seeds: int) -> str:
    words = [*(f'--vary "{v}"' for v in study.varied), " ".join([*SMALL, *study.settings])]
    head = f"unift compare --recipe lock --methods {study.method} --seeds {seeds} --run FOLDER/{study.folder}"
    return " \\\n  ".join([head, *words])


def finished(jobs: Sequence[Job]) -> list[Result]:
    files = [(job, job.folder / "result.json") for job in jobs]
    return [json.loads(path.read_text()) | {"method": job.method} for job, path in files if path.is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--finished", action="store_true")
    args = parser.parse_args()
    if args.print:
        print("\n\n".join(command(study, args.seeds) for study in STUDIES))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    panels: dict[str, list[vary.Line]] = {}
    for study in STUDIES:
        jobs = jobs_of(study, args.folder.absolute(), args.seeds)
        if not args.finished:
            run_many(jobs, args.workers, lambda text: print(text, file=sys.stderr, flush=True))
        panels |= panels_of(study, finished(jobs))
    body = vary.table(panels)
    pages.put(DOCS / "ablations.md", "ablations", body)
    vary.figure(panels, DOCS / "ablations.png")
    print(body)


if __name__ == "__main__":
    main()
