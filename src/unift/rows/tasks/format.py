"""Whether the rows' own solutions carry their answer where it is looked for: one rule a run, checked before it starts.

Only rows of built-in tasks that mark their answer are looked at: what another reward reads is its own business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import cast

from unift.rows.store import StoredRows
from unift.rows.tasks.answer import OPEN, PLACES, extract_answer
from unift.rows.tasks.base import check_rule
from unift.types import ConfigError, DataError, Row, Score

TRIED = 100  # rows with a solution that are looked at
LOOKED_AT = 1000  # rows, for a few among them that are unlike the others
ENOUGH = 0.5  # share of them whose own solution must be right


def answer_rule(rows: Sequence[Row], setting: str = "auto", rule: str = "unift") -> str:
    """The place of the answer for a whole run: ``setting`` itself, or for "auto" the one that the solutions use.

    "auto": of tags, hash and boxed the one under which most of the rows' own solutions are right (on a tie the first), if
    they are at least half of them; else the last number, if that is right more often. "tags" where no row has a solution
    or no place makes one right, and with the official rules, which know no other. Raises ConfigError.
    """
    if setting != "auto":
        extract_answer("", setting)  # refuses an unknown word
        check_rule(rule, setting)
        return setting
    if rule == "paper":
        return PLACES[0]
    accepted = places(rows)
    marked = max(PLACES[:-1], key=lambda place: accepted[place])  # a last number stands in almost every solution
    if accepted[marked] >= ENOUGH * len(_with_solution(rows, "auto")):
        return marked
    return max(PLACES, key=lambda place: accepted[place])


def all_marked(rows: Iterable[tuple[int, Row]], name: str) -> bool:
    """Do all solutions mark their answer themselves, most of them rightly? Then each row ends with its mark (`with_own_ending`):
    the steps stop before it, so that no hint shows the answer. Rows of several kinds keep the answer tags that were written
    behind them, which are the same for all.

    rows: (number, row) of those whose ending was written for them; reading stops at the first that marks no answer. name: of
    their source. Raises DataError where all are marked and most mark another answer than the column's, which would then stand
    behind a solution that says otherwise.
    """
    tried = right = 0
    faulty: list[tuple[int, Row, str]] = []
    for number, row in rows:
        found = _marked(row)
        if found is None:
            return False
        if tried < TRIED:
            tried, right = tried + 1, right + _own(found[0], "auto", found[1]).right
            other = other_answer(row)
            faulty += [] if other is None else [(number, row, other)]
    if len(faulty) > (1 - ENOUGH) * tried:
        number, row, other = faulty[0]
        raise DataError(
            f"{name}, row {number}, column 'answer': {row.answer!r:.60}, but the row's own solution ends with {other!r:.60}; "
            f"{len(faulty)} of the {tried} rows tried contradict themselves so. Mend the rows; if they are meant so "
            "(wrong answers with scores, or the mark is no answer), say in a column 'ending' what follows the steps, if only ''"
        )
    return tried > 0 and right >= ENOUGH * tried


def ending_of(answer: object) -> str:
    """What is written behind the steps of a solution that comes without an ending."""
    return f"\n<answer> {answer} </answer>"


def partly_marked(rows: Iterable[Row]) -> str:
    """A sentence where most solutions mark their answer in the steps and a few do not (of the first `LOOKED_AT` rows whose
    ending was written for them): then `all_marked` says no for the sake of those few, and the marks of all others stay in the
    steps, where a hint shows the answer. "" elsewhere.
    """
    written = [
        (number, row)
        for number, row in enumerate(islice(rows, LOOKED_AT), start=1)
        if row.steps and row.ending == ending_of(row.answer)
    ]
    bare = [number for number, row in written if _marked(row) is None]
    marked = len(written) - len(bare)
    if not bare or marked < ENOUGH * len(written):
        return ""
    named = f"row {bare[0]} does" if len(bare) == 1 else f"{len(bare)} do (the first: row {bare[0]})"
    return (
        f"{marked} of {len(written)} solutions mark their answer in the steps and {named} not, so answer tags were put behind "
        "all of them and the marks stay in the steps, where hints show the answer: mark it in every solution, or in none"
    )


def with_own_ending(row: Row) -> Row:
    """The row with the mark of its solution as its ending; as it is where there is no mark."""
    found = _marked(row)
    return row if found is None else found[0]


_MARKS = {"tags": OPEN, "hash": "####", "boxed": "\\boxed"}


def _marked(row: Row) -> tuple[Row, str] | None:
    """(the row that ends with the answer as its own steps mark it, the place), or None."""
    from unift.rows.tasks import get_task, task_names

    if row.task not in task_names() or not get_task(row.task).marked:
        return None
    text = "".join(row.steps)
    for place, sign in _MARKS.items():
        start = text.rfind(sign)
        if start < 0 or extract_answer(text[start:], place) is None:
            continue
        steps: list[str] = []
        left = start
        for step in row.steps:
            steps += [step[:left]] if left > 0 else []
            left -= len(step)
        while steps and not steps[-1].strip():  # white space alone before the mark belongs to it
            steps.pop()
        ending = text[len("".join(steps)) :]
        return (replace(row, steps=tuple(steps), ending=ending), place) if steps else None
    return None


def other_answer(row: Row) -> str | None:
    """The answer that the row's own solution marks, where it is not the column's; None where they agree or nothing is marked.

    The steps' own mark goes before an ending, which may have been written for them. A line of "####" within a solution is a
    heading.
    """
    from unift.rows.tasks import get_task, task_names

    if row.answer is None or row.task not in task_names() or not get_task(row.task).marked:
        return None
    for text in ("".join(row.steps), row.solution):
        for place, sign in _MARKS.items():
            start = text.rfind(sign)
            found = extract_answer(text[start:], place) if start >= 0 else None
            if found is None or (place == "hash" and "\n" in text[start:].strip()):
                continue
            right = get_task(row.task).score(text[start:], row, answer=place).right
            return None if right else found
    return None


def contradictions(rows: Iterable[Row]) -> list[tuple[int, Row, str]]:
    """(number from 1, row, the answer of its solution) of the rows whose solution ends with another answer than the column's."""
    found = ((number, row, other_answer(row)) for number, row in enumerate(rows, start=1))
    return [(number, row, other) for number, row, other in found if other is not None]


def check_answers(rows: Sequence[Row], function: object, source: str) -> None:
    """DataError for the first row without an answer, if a built-in verifier judges the rows: it has nothing to compare with; or
    without a built-in task, if that shall choose the verifier.

    function: the setting (one function, or several with weights). source: what messages put before the row's number.
    """
    from unift.rows.tasks import task_names

    several = cast("Iterable[object]", function) if isinstance(function, (list, tuple)) else ()
    parts = [function] if isinstance(function, str) else list(several)
    named = {part if isinstance(part, str) else getattr(part, "function", None) for part in parts}
    if isinstance(rows, StoredRows):
        bare = rows.facts.without_answer
    else:
        bare = next((number for number, row in enumerate(rows, start=1) if row.answer is None), None)
    if bare is not None and named & {"auto", *task_names()}:
        raise DataError(
            f"{source} {bare}, column 'answer': missing; the verifier needs it (TRL rows may name it 'solution'; it is "
            "reward_model.ground_truth in verl's). Add it, or name a reward of your own, which may do without: "
            "reward.function=file.py:function"
        )
    if "auto" in named:
        _check_tasks(rows, source)


def _check_tasks(rows: Sequence[Row], source: str) -> None:
    from unift.rows.tasks import task_names

    known = set(task_names())
    if isinstance(rows, StoredRows):
        strange = next(((None, task) for task in rows.facts.tasks if task not in known), None)
    else:
        strange = next(((number, row.task) for number, row in enumerate(rows, start=1) if row.task not in known), None)
    if strange is None:
        return
    number, task = strange
    where = source.rpartition(",")[0] if number is None else f"{source} {number}"  # rows on disk: which one is not kept
    found = f"found {task!r}" if task else "missing"
    raise DataError(
        f"{where}, column 'task': {found}, and reward.function=auto takes the verifier from it. Expected one of "
        f"{', '.join(sorted(known))}, or name a reward: reward.function=math for all rows, or reward.function=file.py:function"
    )


def check_format(rows: Sequence[Row], function: object = "auto", rule: str = "unift", answer: str = "tags") -> None:
    """ConfigError if most of the rows' own solutions earn nothing: then no completion in their form could.

    rows: training rows. function, rule: the settings of the reward (one function, or several with weights). answer: what
    `answer_rule` returned.
    """
    from unift.rows.tasks import task_names

    if not isinstance(function, str):  # several with weights
        for part in cast("Iterable[object]", function) if isinstance(function, Iterable) else ():
            check_format(rows, part if isinstance(part, str) else getattr(part, "function", None), rule, answer)
        return
    if function != "auto" and function not in task_names():
        return
    some = _with_solution(rows, function)
    scores = [_own(row, function, answer, rule) for row in some]
    right = sum(score.right for score in scores)
    if right >= ENOUGH * len(some):
        return
    row, score = next((row, score) for row, score in zip(some, scores) if not score.right)
    others = {place: n for place, n in places(some, function).items() if n > right} if rule == "unift" else {}
    advice = ", ".join(f"reward.answer={place} accepts {n}" for place, n in others.items())
    raise ConfigError(
        f"{right} of the {len(some)} solutions tried of the training rows are right under reward.answer={answer}, "
        f"reward.rule={rule} (row {row.id!r}: {score.note or 'wrong'}), so completions in their form would earn nothing. "
        f"{advice or 'No other place of the answer does better: mend the solutions or the answers'}."
    )


def meant_right(rows: Sequence[Row], label: str | None) -> Sequence[Row]:
    """The rows that `check_format` may judge: where a column scores them (``sample.label``), none below half."""
    if label is None:
        return rows
    scored = ((row, row.extra.get(label)) for row in rows)
    return list(islice((row for row, x in scored if not (isinstance(x, (bool, int, float)) and x < 0.5)), TRIED))


def places(rows: Sequence[Row], function: object = "auto") -> Counter[str]:
    """For each place of an answer, how many of the rows' own solutions are right under it."""
    some = _with_solution(rows, function)
    return Counter({place: sum(_own(row, function, place).right for row in some) for place in PLACES})


def _with_solution(rows: Sequence[Row], function: object) -> list[Row]:
    from unift.rows.tasks import get_task, task_names

    marked = {name for name in task_names() if get_task(name).marked}
    if isinstance(rows, StoredRows) and function == "auto" and not marked & set(rows.facts.tasks):
        return []  # as reading every row from disk would find
    answered = (row for row in rows if row.answer is not None)
    some = (
        row for row in answered if row.solution.strip() and (row.task if function == "auto" else function) in marked
    )
    return list(islice(some, TRIED))


def _own(row: Row, function: object, answer: str, rule: str = "unift") -> Score:
    from unift.rows.tasks import get_task

    task = get_task(row.task if function == "auto" else str(function))
    return task.score(row.solution, row, rule=rule, answer=answer)
