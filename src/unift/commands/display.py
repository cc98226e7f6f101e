"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

FAILURES = ("timeouts", "crashes", "exceptions", "bad_values")
WINDOW = 50  # reports that the speed is measured over
WIDE = 110  # columns of a terminal that show every part of a step; a narrower one leaves out parts below 2 %


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


PARTS = ("generate", "score", "reference", "update", "save", "wait")  # of a step, metrics time/<part>


def split(metrics: dict[str, Any], least: float = 0.0) -> str:
    """Milliseconds of the parts of a step; those below ``least`` of their sum are left out."""
    seconds = {part: metrics[f"time/{part}"] for part in PARTS if f"time/{part}" in metrics}
    enough = least * sum(seconds.values())
    return " / ".join(f"{part} {1000 * s:.0f}" for part, s in seconds.items() if s >= enough)


def fields(
    metrics: dict[str, Any], total: int, accuracy: float | None, left: float | None, least: float = 0.0
) -> dict[str, str]:
    """The displayed numbers of one step, as text; ``-`` where the step has none. accuracy: share; left: seconds."""
    failed = failures({name: metrics.get(f"reward/{name}", 0) for name in FAILURES})
    return {
        "step": f"{metrics['step']}/{total}",
        "reward": f"{metrics['reward']:.3f}" if "reward" in metrics else "-",
        "accuracy without hint": f"{100 * accuracy:.1f} %" if accuracy is not None else "-",
        "hint share": f"{100 * metrics['hint/fraction']:.0f} %" if "hint/fraction" in metrics else "-",
        "tokens/s": f"{metrics['tokens/per_second']:,.0f}" if "tokens/per_second" in metrics else "-",
        "time left": duration(left) if left is not None else "-",
        "ms of a step": split(metrics, least) or "-",
        "saved by shared prefix": f"{100 * metrics['tokens/shared_ratio']:.0f} %"
        if "tokens/shared_ratio" in metrics
        else "-",
        **({"scores failed": failed} if failed else {}),
    }


def failures(counts: dict[str, Any]) -> str:
    """``5 timeouts, 1 crashes``: the failed scores so far by kind, empty if there are none."""
    return ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in FAILURES if counts.get(name))


def summary(result: dict[str, Any]) -> str:
    """What came out of a run: accuracies before and after with their intervals, scores that failed."""
    lines: list[str] = []
    for name in ("base", "test", "train"):
        a = result.get(name)
        if a:
            label = {"base": "before, held-out", "test": "after, held-out", "train": "after, training rows"}[name]
            lines.append(
                f"{label}: {100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}] of {a['n']}"
            )
    if not result.get("test"):
        lines.append("held-out accuracy: not measured (set data.test)")
    for name, where in (("train", "in training"), ("eval", "in evaluations")):
        counts = result.get("scorer", {}).get(name, {})
        if failed := failures(counts):
            lines.append(f"scores that failed {where}: {failed}, of {counts['total']}; a failed score is no reward")
    for name, a in result.get("test", {}).get("pass@k", {}).items():
        lines.append(f"{name}: {100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]")
    return "\n".join(lines)


class Live:
    """``update(metrics, total_steps)`` after every step; a context manager.

    every: seconds between two plain lines where stdout is no terminal; evaluations and the last step always print.
    """

    def __init__(self, every: float = 5.0) -> None:
        self.every, self.last = every, 0.0
        self.accuracy: float | None = None
        self.speed: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # (step, training seconds so far)
        self.shown: dict[str, str] | None = None  # of the last step
        self.share = 0.0  # of the steps done
        self.live: Any = None

    def __enter__(self) -> Live:
        if sys.stdout.isatty():
            from rich.live import Live as RichLive

            self.live = RichLive("loading rows and model ...", refresh_per_second=4)
            self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*exception)
            self.live = None

    def update(self, metrics: dict[str, Any], total: int) -> None:
        step, now = metrics["step"], time.monotonic()
        evaluated = "eval/test/accuracy" in metrics
        if evaluated:
            self.accuracy = metrics["eval/test/accuracy"]
        # The run's own clock, not the wall: a continued run replays its old lines in no time.
        if "time/elapsed" in metrics:
            self.speed.append((step, metrics["time/elapsed"]))
        if str(metrics.get("forward", "shared")).startswith("plain"):
            self._say(f"forward: {metrics['forward']}")
        narrow = self.live is not None and self.live.console.width < WIDE
        shown = fields(metrics, total, self.accuracy, self._left(step, total), 0.02 if narrow else 0.0)
        self.shown, self.share = shown, step / max(total, 1)
        if self.live is not None:
            self.live.update(_panel(shown, self.share))
        elif evaluated or step == total or now - self.last > self.every:
            self.last = now
            print("  ".join(f"{name} {value}" for name, value in shown.items() if value != "-"), flush=True)

    def watch(self, what: str, done: int, total: int) -> None:
        """How far an evaluation is: said when it is announced (``done`` 0), then as often as steps are."""
        now = time.monotonic()
        text = f"evaluating {what}: {done} of {total}"
        if self.live is not None:
            self.live.update(text if self.shown is None else _panel({**self.shown, "now": text}, self.share))
        elif done == 0 or (done < total and now - self.last > self.every):
            self.last = now
            print(text, flush=True)

    def _say(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text)
        else:
            print(text, flush=True)

    def _left(self, step: int, total: int) -> float | None:
        """Seconds to go at the speed of the last reports."""
        if not self.speed:
            return None
        first, since = self.speed[0] if len(self.speed) > 1 else (0, 0.0)
        last, until = self.speed[-1]
        return (until - since) / (last - first) * (total - step) if last > first else None


def _panel(shown: dict[str, str], share: float) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        table.add_row(name, value)
    return Group(table, ProgressBar(total=1.0, completed=share, width=60))


class Quiet(Live):
    """Prints nothing."""

    def __enter__(self) -> Quiet:
        return self

    def update(self, metrics: dict[str, Any], total: int) -> None:
        pass

    def watch(self, what: str, done: int, total: int) -> None:
        pass
