"""Knights and Knaves: puzzles with one solution, and derivations whose every sentence follows."""

from __future__ import annotations

import ast
import re
from itertools import product

import pytest

from unift.rows.readers import read_rows
from unift.rows.tasks import make_rows
from unift.types import Row


def truth(s, roles):
    """Another evaluator of the statements than the task's own."""
    form, *parts = s
    if isinstance(parts[0], int):
        return roles[parts[0]] is (form == "telling-truth")
    a, b = truth(parts[0], roles), truth(parts[-1], roles)
    return {"not": not a, "and": a & b, "or": a | b, "->": a <= b, "<=>": a == b}[form]


def claim(text, names):
    """A sentence back to a statement. The data has one operator a sentence, "not" only about one person."""
    for form, pattern in (
        ("<=>", "(.+) if and only if (.+)"),
        ("->", "[Ii]f (.+) then (.+)"),
        ("and", "(.+) and (.+)"),
        ("or", "(.+) or (.+)"),
    ):
        if found := re.fullmatch(pattern, text):
            return (form, *(claim(part, names) for part in found.groups()))
    name, no, role = re.fullmatch(r"(\w+) is (not )?a (knight|knave)", text).groups()
    s = ("telling-truth" if role == "knight" else "lying", names.index(name))
    return ("not", s) if no else s


def follow(row):
    """Check every sentence of a derivation; returns the roles it ends with. Any step that does not follow asserts."""
    names, statements = row.answer["names"], ast.literal_eval(row.answer["statements"])
    everybody = [dict(enumerate(r)) for r in product((False, True), repeat=len(names))]
    stack, refuted = [], [set()]  # assumed (person, role); roles refuted at each depth under what lies below

    def possible(person, roles):
        fits = [r for r in everybody if all(r[p] == role for p, role in roles.items())]
        return any(truth(statements[person], r) == roles[person] for r in fits)

    def same(person, kind, roles, text):
        assert kind == ("" if roles[person] else "false ")
        assert all(truth(claim(text, names), r) == truth(statements[person], r) for r in everybody)

    def pop():
        refuted.pop()
        refuted[-1].add(stack.pop())

    lines = row.steps[: -len(names)]
    for line in lines:
        roles = dict(stack)
        if found := re.fullmatch(r"Assume (\w+) is a (\w+)\. ", line):
            person, role = names.index(found[1]), found[2] == "knight"
            assert person not in roles and (person, role) not in refuted[-1]
            assert role or (person, True) in refuted[-1], "a knave is assumed only when a knight is refuted"
            stack.append((person, role))
            refuted.append(set())
        elif found := re.fullmatch(r"No contradiction is found in their (false |)claim that (.+)\.\n", line):
            same(stack[-1][0], found[1], roles, found[2])
            assert all(possible(p, roles) for p in roles)
        elif found := re.fullmatch(
            r"(\w+) cannot be a (\w+), because this would contradict the (false |)claim of (their own|\w+) that (.+)\.\n",
            line,
        ):
            person, role = names.index(found[1]), found[2] == "knight"
            owner = person if found[4] == "their own" else names.index(found[4])
            assert person not in roles
            roles[person] = role
            same(owner, found[3], roles, found[5])
            assert not possible(owner, roles)
            refuted[-1].add((person, role))
        else:
            found = re.fullmatch(
                r"We have exhausted all possibilities for (.+), so let us go back and reconsider (\w+)\.\n", line
            )
            assert found, line
            for number, name in enumerate(re.split(r", and | and |, ", found[1])):
                person = names.index(name)
                if number:  # the first stands at the present depth, the others were assumed to be knaves
                    assert stack[-1] == (person, False)
                    pop()
                assert {(person, True), (person, False)} <= refuted[-1]
            assert stack[-1] == (names.index(found[2]), True)
            pop()
    assert sorted(dict(stack)) == list(range(len(names)))
    return dict(stack)


def check_puzzle(row):
    names, statements = row.answer["names"], ast.literal_eval(row.answer["statements"])
    found = [
        r
        for r in product((False, True), repeat=len(names))
        if all(truth(s, r) == role for s, role in zip(statements, r, strict=True))
    ]
    assert found == [tuple(row.answer["solution"])]
    assert follow(row) == dict(enumerate(found[0]))
    said = [
        f"({i}) {n} is a {'knight' if role else 'knave'}"
        for i, (n, role) in enumerate(zip(names, found[0], strict=True), 1)
    ]
    assert "".join(row.steps[-len(names) :]) == "Therefore, " + "\n".join(said)
    assert row.ending == " </think>\n<answer> " + "\n".join(said) + " </answer>"


@pytest.mark.parametrize("people", [2, 3, 5, 7])
def test_knights_puzzles_are_unique_and_their_steps_sound(people):
    """Brute force finds exactly the one solution; every sentence of the derivation follows; the end is the answer."""
    for row in make_rows("knights", 60 // people, people, "train", people=people):
        check_puzzle(row)


def test_released_puzzles_pass_the_same_check(data_folder):
    """The check reads the published derivations, so ours have their format."""
    for row in read_rows(str(data_folder / "logic" / "train.parquet"))[::150]:
        check_puzzle(row)


def test_the_check_of_derivations_can_fail():
    row = next(r for r in make_rows("knights", 20, 0, "train") if any("cannot" in s for s in r.steps))
    n = next(i for i, s in enumerate(row.steps) if "cannot" in s)
    flipped = row.steps[n].replace("a knight,", "a KNAVE,").replace("a knave,", "a knight,").replace("KNAVE", "knave")
    for steps in ((*row.steps[:n], flipped, *row.steps[n + 1 :]), row.steps[:n] + row.steps[n + 1 :], row.steps[2:]):
        with pytest.raises((AssertionError, IndexError, KeyError)):
            check_puzzle(Row(row.id, row.prompt, steps, row.ending, row.answer))
