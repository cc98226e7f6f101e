"""Knights and Knaves: who tells the truth (knight) and who lies (knave)?  Puzzles with exactly one solution.

A statement is a nested tuple over the positions of the people, as in the data released with UFT:
("telling-truth", i), ("lying", i), ("not", s), ("and", s, t), ("or", s, t), ("->", s, t), ("<=>", s, t).
The worked solution is a depth-first search told in sentences: assume a role, check the claims of everyone assumed so
far, go back when both roles of somebody are contradicted.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Hashable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from unift.rng import generator
from unift.rows.tasks.answer import extract_answer, paper_full_text, unwrapped
from unift.rows.tasks.base import Task, build_row, check_rule, field_of, span, verdict
from unift.types import DataError, Row, Score

PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves "
    "always lie. You meet {count} inhabitants: {names}. {claims} So who is a knight and who is a knave? Show your work "
    "in <think> </think> tags. And return the final answer in <answer> </answer> tags, for example <answer> (1) Zoey is "
    "a knight\n(2) Oliver is a knight\n(3)... </answer>.\nAssistant: Let me solve this step by step.\n<think> "
)
SAYINGS = (
    '{name} said, "{claim}".',
    '{name} stated, "{claim}".',
    '{name} remarked, "{claim}".',
    "{name} told you that {claim}.",
    'According to {name}, "{claim}".',
    '"{claim}," {name} declared.',
)
NAMES = (
    "Abigail Adam Alice Amelia Anna Benjamin Bruno Carla Charlotte Clara Daniel David Diego Elena Elias Emily Ethan "
    "Felix Fiona Grace Hannah Henry Ingrid Ivan Jack James Julia Karim Laura Leo Lucas Maria Mateo Mia Nadia Noah "
    "Nora Olivia Oscar Paula Peter Quentin Rosa Ruth Samuel Sofia Theo Ursula Victor Wendy Yara Zoe"
).split()
ROLES = ("knave", "knight")  # indexed by a bool: True tells the truth
MAX_ANSWER = 4_000  # characters of an answer that are read

Statement = Any  # nested tuples, see the module docstring


def make(seed: int, index: int, *, people: Any = (3, 7)) -> Row:
    """Puzzle ``index`` of this seed for ``people`` inhabitants (a whole number or (low, high), 2 to 10)."""
    low, high = span("people", people, 2, 10)
    rng = generator("knights", seed, index)
    count = int(rng.integers(low, high + 1))
    names: list[str] = [NAMES[i] for i in rng.choice(len(NAMES), count, replace=False)]
    statements: tuple[Statement, ...] = ()
    found: list[tuple[bool, ...]] = []
    while len(found) != 1:  # about 4 draws in 10 have exactly one solution, whatever the number of people
        statements = tuple(_draw_statement(rng, count) for _ in range(count))
        found = list(solutions(statements))
    sayings = (SAYINGS[int(rng.integers(len(SAYINGS)))] for _ in names)
    claims = [saying.format(name=n, claim=say(s, names)) for saying, n, s in zip(sayings, names, statements)]
    prompt = PROMPT.format(count=count, names=_list(names), claims=" ".join(claims))
    lines = [f"({i}) {name} is a {ROLES[role]}" for i, (name, role) in enumerate(zip(names, found[0]), 1)]
    steps = [*derive(names, statements), *(f"{line}\n" for line in lines[:-1]), lines[-1]]
    steps[-len(lines)] = f"Therefore, {steps[-len(lines)]}"
    text = "\n".join(lines)
    answer = {"names": names, "solution": list(found[0]), "statements": str(statements), "solution_text_format": text}
    return build_row("knights", prompt, steps, f" </think>\n<answer> {text} </answer>", answer, {"index": index})


def score(
    completion: str, row: Row, *, hint: str = "", format_score: float = 0.0, rule: str = "unift", answer: str = "tags"
) -> Score:
    """Right: the answer names everybody exactly once, with the right role, and says nothing else.

    Every piece of the answer must read "<name> is a knight" or "<name> is a knave" (pieces end at a new line, a number
    such as "(2)" or "2.", a comma, semicolon, full stop, or "and"; letter case is ignored). Anything left over makes
    it unreadable, so hedged, negated and contradictory answers are wrong. ``format_score`` goes to a readable answer
    that names everybody once. Bold and backticks are dropped. answer: where it stands, see `tasks.answer`. rule="paper"
    is the looser official reading: "knight" and "knave" stand as often as there are people, also inside words, and the
    first sentence about each is right, in any case and spacing; ``format_score`` for any non-empty tag. The hint is not
    used.
    """
    check_rule(rule, answer)
    names = [str(name) for name in field_of(row, "names")]
    truth = {name.casefold(): bool(role) for name, role in zip(names, field_of(row, "solution"))}
    said = paper_full_text(completion) if rule == "paper" else extract_answer(completion, answer)
    if not said:
        return verdict(False, False, format_score, "no answer", answered=False)
    if rule == "paper":
        first = [re.search(rf"\b{re.escape(n)}\b\s+is\s+a\s+\b(knight|knave)\b", said, re.IGNORECASE) for n in names]
        count = sum(said.lower().count(role) for role in ROLES)
        right = count == len(names) and all(
            match is not None and match[1].lower() == ROLES[truth[name.casefold()]] for match, name in zip(first, names)
        )
        return verdict(right, True, format_score)
    roles = read_roles(re.sub(r"\*\*|`", " ", unwrapped(said)), names)
    if isinstance(roles, str):
        return verdict(False, False, format_score, roles)
    wrong = [name for name in names if roles[name.casefold()] != truth[name.casefold()]]
    return verdict(not wrong, True, format_score, f"wrong role for {', '.join(wrong)}" if wrong else "")


_CUT = re.compile(r"[\n,;]|\.(?=\s|$)|\(\d{1,3}\)|\b\d{1,3}[.):]|\band\b", re.IGNORECASE)


def read_roles(answer: str, names: Sequence[str]) -> dict[str, bool] | str:
    """{name in folded case: is a knight} for exactly these names, or a sentence that says why it cannot be read."""
    if len(answer) > MAX_ANSWER:
        return f"{len(answer)} characters, at most {MAX_ANSWER} are read"
    known = {name.casefold() for name in names}
    roles: dict[str, bool] = {}
    for piece in filter(None, map(str.strip, _CUT.split(answer))):
        words = piece.casefold().split()
        name = " ".join(words[:-3])
        if words[-3:-1] != ["is", "a"] or words[-1] not in ROLES or name not in known:
            return f"cannot read {piece[:80]!r}"
        if name in roles:
            return f"{name!r} is named twice"
        roles[name] = words[-1] == ROLES[True]
    missing = [name for name in names if name.casefold() not in roles]
    return f"nothing about {', '.join(missing)}" if missing else roles


def canonical(row: Row) -> Hashable:
    """The puzzle up to the names, the order of the people and of the sides of and/or/<=>.

    A refined colouring of the graph of who speaks about whom: the same for puzzles that differ only in these, and very
    rarely the same for others, which errs on the safe side (they then share a split).
    """
    statements = read_statements(row)
    colours = ["" for _ in statements]
    for _ in statements:
        colours = [_hash(_shape(s, colours, speaker)) for speaker, s in enumerate(statements)]
    return tuple(sorted(colours))


def read_statements(row: Row) -> tuple[Statement, ...]:
    """The statements of a row (text of the nested tuples, or the nesting itself), checked; DataError otherwise."""
    raw, count = field_of(row, "statements"), len(field_of(row, "names"))
    try:
        statements = ast.literal_eval(raw) if isinstance(raw, str) else raw
        checked = tuple(_check(statement, count) for statement in statements)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(
            f"row {row.id!r}, column 'answer': statements {str(raw)[:200]!r} cannot be read: {error}"
        ) from None
    if len(checked) != count:
        raise DataError(f"row {row.id!r}, column 'answer': {len(checked)} statements for {count} names.")
    return checked


_ARITY = {"telling-truth": 0, "lying": 0, "not": 1, "and": 2, "or": 2, "->": 2, "<=>": 2}


def _check(s: Statement, count: int) -> Statement:
    """This statement as tuples, every form known and every person in range; ValueError otherwise."""
    arity = _ARITY.get(s[0])
    if arity == 0 and len(s) == 2 and isinstance(s[1], int) and 0 <= s[1] < count:
        return tuple(s)
    if not arity or len(s) != arity + 1:
        raise ValueError(f"unknown statement {s!r}")
    return (s[0], *(_check(part, count) for part in s[1:]))


def holds(s: Statement, roles: Sequence[bool]) -> bool:
    """Truth of a statement when ``roles[i]`` says whether person i is a knight."""
    form = s[0]
    if form in ("telling-truth", "lying"):
        person: int = s[1]
        return roles[person] if form == "telling-truth" else not roles[person]
    if form == "not":
        return not holds(s[1], roles)
    left, right = holds(s[1], roles), holds(s[2], roles)
    return {"and": left and right, "or": left or right, "->": not left or right, "<=>": left == right}[form]


def solutions(statements: Sequence[Statement]) -> Iterator[tuple[bool, ...]]:
    """Every assignment of roles under which exactly the knights' statements hold."""
    for roles in product((True, False), repeat=len(statements)):
        if all(holds(s, roles) == role for s, role in zip(statements, roles)):
            yield roles


def say(s: Statement, names: Sequence[str]) -> str:
    """A statement as a sentence without its full stop."""
    form = s[0]
    if form in ("telling-truth", "lying"):
        return f"{names[s[1]]} is a {ROLES[form == 'telling-truth']}"
    if form == "not" and s[1][0] in ("telling-truth", "lying"):
        return f"{names[s[1][1]]} is not a {ROLES[s[1][0] == 'telling-truth']}"
    if form == "not":
        return f"it is not true that {say(s[1], names)}"
    left, right = say(s[1], names), say(s[2], names)
    return {
        "and": f"{left} and {right}",
        "or": f"{left} or {right}",
        "->": f"If {left} then {right}",
        "<=>": f"{left} if and only if {right}",
    }[form]


def derive(names: Sequence[str], statements: Sequence[Statement]) -> list[str]:
    """The search for the solution, one step a sentence; each text ends with a space or a line end."""
    steps: list[str] = []
    _search(names, statements, {}, steps)
    return steps


def _search(
    names: Sequence[str], statements: Sequence[Statement], roles: dict[int, bool], steps: list[str]
) -> list[str] | None:
    """Extend ``roles`` (in the order of assuming) to a solution: None, or who was exhausted, deepest first."""
    if len(roles) == len(names):
        return None
    person = _next_person(statements, roles)
    name, exhausted = names[person], []
    for role in (True, False):
        if exhausted:
            back = f"so let us go back and reconsider {name}"
            steps.append(f"We have exhausted all possibilities for {_list(exhausted)}, {back}.\n")
            exhausted = []
        roles[person] = role
        against = next((p for p in sorted(roles) if not _possible(statements[p], roles[p], roles)), None)
        if against is not None:
            owner = "their own" if against == person else names[against]
            kind = "claim" if roles[against] else "false claim"
            said = f"the {kind} of {owner} that {say(statements[against], names)}"
            steps.append(f"{name} cannot be a {ROLES[role]}, because this would contradict {said}.\n")
        else:
            kind = "claim" if role else "false claim"
            steps.append(f"Assume {name} is a {ROLES[role]}. ")
            steps.append(f"No contradiction is found in their {kind} that {say(statements[person], names)}.\n")
            deeper = _search(names, statements, roles, steps)
            if deeper is None:
                return None
            exhausted = deeper
        del roles[person]
    return [*exhausted, name]


def _next_person(statements: Sequence[Statement], roles: dict[int, bool]) -> int:
    """Somebody that the people assumed so far speak about, latest speaker first; else the first that is left."""
    spoken_of = (p for speaker in reversed(roles) for p in _people(statements[speaker]))
    return next(p for p in (*spoken_of, *range(len(statements))) if p not in roles)


def _possible(s: Statement, truth: bool, roles: dict[int, bool]) -> bool:
    """Whether some roles for those who have none yet give this statement this truth value."""
    people = sorted(set(_people(s)))
    options = product(*((roles[p],) if p in roles else (True, False) for p in people))
    return any(holds(s, dict(zip(people, choice))) == truth for choice in options)  # type: ignore[arg-type]


def _people(s: Statement) -> list[int]:
    return [s[1]] if s[0] in ("telling-truth", "lying") else [p for part in s[1:] for p in _people(part)]


def _draw_statement(rng: np.random.Generator, count: int) -> Statement:
    """One of the six forms with equal chance; its two sides speak of the same person only by chance."""

    def atom() -> Statement:
        return ("telling-truth", "lying")[int(rng.integers(2))], int(rng.integers(count))

    form = ("is", "not", "and", "or", "->", "<=>")[int(rng.integers(6))]
    return atom() if form == "is" else ("not", atom()) if form == "not" else (form, atom(), atom())


def _list(names: Sequence[str]) -> str:
    """ "A", "A and B", "A, B, and C"."""
    if len(names) < 3:
        return " and ".join(names)
    return f"{', '.join(names[:-1])}, and {names[-1]}"


def _shape(s: Statement, colours: list[str], speaker: int) -> str:
    """A statement with people replaced by colours, sides ordered where order has no meaning, "not" folded away."""
    if s[0] == "not" and s[1][0] in ("telling-truth", "lying"):
        s = ("lying" if s[1][0] == "telling-truth" else "telling-truth", s[1][1])
    if s[0] in ("telling-truth", "lying"):
        return f"{s[0]}:{'self' if s[1] == speaker else colours[s[1]]}"
    parts = [_shape(part, colours, speaker) for part in s[1:]]
    if s[0] in ("and", "or", "<=>"):
        parts.sort()
    same = "same" if len({*_people(s)}) < len(_people(s)) else ""
    return f"{s[0]}({','.join(parts)}){same}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


TASK = Task("knights", make, score, canonical, {"people": (3, 7)})
