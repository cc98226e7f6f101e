"""The verifier of mathematics beside math-verify: wrong verdicts on natural spellings, and time on fuzzed completions.

    PYTHONPATH=src python benchmarks/verifier.py [--data ../shared/data/math/rows.parquet] [--fuzz 10000] [--show]

CPU only, one process. Needs math-verify, which unift itself does not use. Targets: the MATH rows where the file is
there, and the hand-written lists of tests/spellings.py for the other benchmarks. Spellings and near misses come from
that file's generator. math-verify gets target and answer between dollar signs; the answer as it is where it brings
its own, or where nothing is found between them. Its wall-clock limit is its default.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from spellings import TARGETS, right, wrong

from unift.rows.tasks import get_task
from unift.types import Row

PIECES = [
    "<answer>", "</answer>", "\\frac{", "\\sqrt{", "\\sqrt[3]{", "}", "{", "(", ")", "[", "]", "^", "^{", "_", "10",
    "9", "2006!", "1/3", "x", "n", "\\pi", "e", "i", "\\infty", "+", "-", "*", "/", "=", "<", "\\le", ",", " and ",
    " or ", "\\cup", "\\pm", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\text{ cm}", "$", "\\boxed{", "%",
    "^\\circ", "\\sin", "\\log_", "!", "\\binom{", ":", "\\ldots", " ", "people", "**", "|", "1e999", "1,000", ".",
    "\\left(", "\\right)", "\\lfloor", "\\rfloor", "\\overline{", "∞", "½", "\n", "9^9^9", "10^{10^{10}}", "99999!",
    "\\{", "\\}", "((((",
]  # fmt: skip


def mathverify(target: str, answer: str) -> bool:
    from math_verify import parse, verify

    gold = parse(target if "$" in target else f"${target}$")
    try:
        said = parse(answer) if "$" in answer or "boxed" in answer else parse(f"${answer}$") or parse(answer)
        return bool(verify(gold, said))
    except Exception:
        return False


def ours(target: str, answer: str) -> bool:
    row = Row("r", "p", (), "", target, "math", {})
    return get_task("math").score(f"</think>\n<answer> {answer} </answer>", row).right


def targets(path: Path) -> dict[str, list[str]]:
    found = dict(TARGETS)
    if path.is_file():
        from unift.rows.readers import read_rows

        rows = read_rows(str(path))
        found = {"MATH": sorted({str(row.answer["target"]) for row in rows})} | found
    return found


def rates(judge, lists, show):
    """Printed: of each list, the share of right spellings refused and of wrong ones paid."""
    total = [0, 0, 0, 0]
    for name, wanted in lists.items():
        counts = [0, 0, 0, 0]
        for target in wanted:
            for expected, texts in ((True, right(target)), (False, wrong(target))):
                for text in texts:
                    got = judge(target, text)
                    at = 0 if expected else 2
                    counts[at] += got != expected
                    counts[at + 1] += 1
                    if show and got != expected:
                        print(f"    {'refused' if expected else 'PAID'}  target {target!r}  answer {text!r}")
        print(f"  {name:9} {summary(counts)}", flush=True)
        total = [a + b for a, b in zip(total, counts)]
    print(f"  {'all':9} {summary(total)}")


def summary(counts: list[int]) -> str:
    refused, right_, paid, wrong_ = counts
    shares = 100 * refused / max(1, right_), 100 * paid / max(1, wrong_)
    return f"refused {refused:5} of {right_:6} right ({shares[0]:5.2f} %)   paid {paid:5} of {wrong_:6} wrong ({shares[1]:5.2f} %)"


def fuzz(count: int, lists) -> None:
    """Times of `score` on completions made of the pieces above or of mutated targets; CPU seconds of this process."""
    rng = random.Random(0)
    pool = [target for wanted in lists.values() for target in wanted]
    times = []
    ours("1", "2")  # what is loaded at the first use
    for k in range(count):
        if k % 3 == 0:
            text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 200)))
        elif k % 3 == 1:
            piece = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 4)))
            text = piece * rng.randrange(1, 1 + 1200 // len(piece))
        else:
            text = rng.choice(right(rng.choice(pool)))
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(2) :]
        target = rng.choice(pool)
        row = Row("r", "p", (), "", target, "math", {})
        begin = time.process_time()
        get_task("math").score(f"<answer>{text}</answer>", row)
        times.append((time.process_time() - begin, text))
    times.sort()
    quantiles = {"median": 0.5, "99 %": 0.99, "99.9 %": 0.999, "worst": 1.0}
    shown = [f"{name} {1e3 * times[min(count - 1, int(q * count))][0]:.2f}" for name, q in quantiles.items()]
    print(f"time of {count} fuzzed completions, ms of CPU: {', '.join(shown)}")
    print(f"  the worst: {times[-1][1][:160]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data/math/rows.parquet")
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--show", action="store_true", help="every wrong verdict of unift")
    parser.add_argument("--only", choices=["unift", "math-verify", "fuzz"])
    args = parser.parse_args()
    lists = targets(args.data)
    if args.only in (None, "unift"):
        print("unift")
        rates(ours, lists, args.show)
    if args.only in (None, "math-verify"):
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        print("math-verify")
        rates(mathverify, lists, False)
    if args.only in (None, "fuzz"):
        fuzz(args.fuzz, lists)


if __name__ == "__main__":
    main()
