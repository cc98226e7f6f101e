"""Verifiers and generators as properties: any text, an independent oracle, and the rules of UFT's official code."""

from __future__ import annotations

import io
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unift.rows.tasks import get_task, make_rows, split_of
from unift.rows.tasks.answer import extract_answer, paper_full_text, paper_last_line
from unift.rows.tasks.arithmetic import MAX_DEPTH, MAX_DIGITS, MAX_TEXT, ExpressionError, parse_expression
from unift.types import ConfigError, Row

FUZZ = settings(max_examples=150, deadline=None)
GENERATED = ["chain", "countdown", "jigsaw", "knights", "lock"]
ROWS = {name: make_rows(name, 3, 0, "train") for name in GENERATED}
ROWS["math"] = [Row("m", "6*7?", (), "", "42", task="math")]

OPTIONS = {
    "chain": st.fixed_dictionaries(
        {
            "operations": st.sampled_from([3, 5, (2, 4)]),
            "signs": st.sampled_from(["+", "+-", "*+", "+-*"]),
            "spaces": st.booleans(),
            "example": st.booleans(),
        }
    ),
    "countdown": st.fixed_dictionaries(
        {"numbers": st.integers(2, 5), "style": st.sampled_from(["paper", "short"]), "integers": st.booleans()}
    ),
    "jigsaw": st.fixed_dictionaries(
        {
            "rows": st.integers(2, 3),
            "cols": st.integers(2, 3),
            "tile": st.sampled_from([4, 16]),
            "form": st.sampled_from(["own", "foreign"]),
            "kind": st.sampled_from(["jigsaw", "colour", "shape", "half"]),
            "square": st.booleans(),
        }
    ),
    "knights": st.fixed_dictionaries({"people": st.integers(2, 6)}),
    "lock": st.fixed_dictionaries(
        {"length": st.integers(3, 6), "keys": st.integers(1, 10), "table_seed": st.integers(0, 3)}
    ),
}

# ---------------------------------------------------------------------------------------------- any text


def some_text(*words):
    """Arbitrary text, and soups of the words that a verifier looks for."""
    known = [*words, "<answer>", "</answer>", "<answer>", "</answer>", "\n", " ", "</think>", "\x00", "é", "𝟺", "²"]
    return st.one_of(st.text(max_size=80), st.lists(st.sampled_from(known), max_size=25).map("".join))


TEXTS = {
    "chain": some_text(*"0123456789+-*= ", "52", "+52", "５２"),
    "countdown": some_text(*"0123456789+-*/().", "**", "//", "19", "e9", "0x1", "__import__"),
    "jigsaw": some_text(*"abcde", *"012345", "a1", "b2", "c3", "d4", "."),
    "knights": some_text("Zoey", " is a ", "knight", "knave", "(1)", " and ", ",", "not ", "."),
    "lock": some_text(*"ABCJ", *"abcj", *"0123", "."),
    "math": some_text("42", "\\frac", "{", "}", "$", "^", "\\boxed{", "\\left", "84/2"),
}


@pytest.mark.parametrize("rule", ["unift", "paper"])
@pytest.mark.parametrize("name", [*GENERATED, "math"])
def test_verifiers_never_raise(name, rule):
    """Any completion, in and out of answer tags: 1, the format score or 0, never an exception."""
    score, rows = get_task(name).score, ROWS[name]

    @settings(max_examples=40 if name == "math" else 150, deadline=None)
    @given(TEXTS[name], st.booleans(), st.integers(0, len(rows) - 1), st.sampled_from(["", "A", "Aa1"]))
    def check(text, tagged, number, hint):
        got = score(
            f"<answer>{text}</answer>" if tagged else text, rows[number], hint=hint, format_score=0.1, rule=rule
        )
        assert got.value in (0.0, 0.1, 1.0) and got.correct == (got.value == 1.0)

    check()


@FUZZ
@given(some_text("a", "<answer", "answer>", "< answer>", "<ANSWER>"))
def test_answer_rules_are_these_regular_expressions(text):
    """ours: the last innermost pair; the official ones: the last lazy match, in the whole text or in the last line."""
    inner = re.findall(r"<answer>((?:(?!</?answer>)[\s\S])*)</answer>", text)
    assert extract_answer(text) == ((inner[-1].strip() or None) if inner else None)
    for rule, searched in ((paper_full_text, text), (paper_last_line, text.split("\n")[-1])):
        lazy = re.findall(r"<answer>([\s\S]*?)</answer>", searched)
        assert rule(text) == (lazy[-1].strip() if lazy else None)


# ---------------------------------------------------------------------------------------------- countdown


def oracle(text):
    """Python's own reading with every literal a Fraction; None for a division by zero. Only for this file's own texts."""
    try:
        value = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None
    assert isinstance(value, Fraction)
    return value


number = st.integers(0, 999).map(str)
expression = st.recursive(
    number,
    lambda e: st.one_of(
        st.tuples(e, st.sampled_from([" + ", "-", "*", " / "]), e).map("".join),
        e.map("({})".format),
        e.map("-({})".format),
    ),
    max_leaves=10,
)


@FUZZ
@given(expression)
def test_expressions_agree_with_fractions(text):
    """Precedence, grouping from the left, unary minus, exact division."""
    found = parse_expression(text)
    assert found.value == oracle(text)
    assert found.numbers == tuple(int(n) for n in re.findall(r"\d+", text))


@settings(max_examples=400, deadline=None)
@given(st.text("0123()+-*/ ", max_size=12))
def test_what_is_accepted_is_what_python_would_accept(text):
    """Symbol soup: accepted texts have Python's value; refused ones hold ``**``, ``//``, a unary plus or no expression."""
    import warnings

    try:
        found = parse_expression(text)
    except ExpressionError:
        if "**" in text or "//" in text or "+" in text or re.search(r"(?<!\d)0\d", text):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "3(4)" reads as a call
            with pytest.raises((SyntaxError, TypeError, AssertionError)):
                oracle(text.strip())
        return
    assert "**" not in text and "//" not in text and found.value == oracle(text.strip())


def test_size_caps():
    """One below the cap is read, one above is refused: length, depth, digits. Nothing is ever evaluated by its size."""
    assert parse_expression("1" * MAX_DIGITS).value == int("1" * MAX_DIGITS)
    assert parse_expression("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH).value == 7
    assert parse_expression("-" * MAX_DEPTH + "7").value == 7
    assert parse_expression("1" + "+1" * ((MAX_TEXT - 1) // 2)).value == 1 + (MAX_TEXT - 1) // 2
    for text in (
        "1" * (MAX_DIGITS + 1),
        "(" * (MAX_DEPTH + 1) + "7" + ")" * (MAX_DEPTH + 1),
        "-" * (MAX_DEPTH + 1) + "7",
    ):
        with pytest.raises(ExpressionError):
            parse_expression(text)
    with pytest.raises(ExpressionError, match="at most 512"):
        parse_expression("1 " + "+1" * (MAX_TEXT // 2))


@pytest.mark.parametrize(
    "text",
    [
        "2**3",
        "2//3",
        "2 * * 3",
        "9**9**9**9",
        "x",
        "int(2)",
        "2e3",
        "0x1F",
        "1_0",
        "2.0",
        "2,3",
        "[2]",
        "2=2",
        "2;3",
        "007",
        "+",
        "2.5",
        ".5",
        "1.2.",
        "2 3",
        "３",
        "²",
        "",
        " ",
        "()",
    ],
)
def test_refused_expressions(text):
    with pytest.raises(ExpressionError):
        parse_expression(text)


COUNTDOWN = Row("c", "", (), "", {"numbers": [2, 3, 6], "target": 12})


@pytest.mark.parametrize(
    ("completion", "ours", "paper"),
    [
        ("so <answer> 2 * 3 + 6 </answer>", 1.0, 1.0),
        ("<answer>2*3+6</answer>\n", 1.0, 0.0),  # docs/traps.md 2: a trailing newline
        ("<answer>2*3+6</answer> as asked", 1.0, 1.0),
        ("<answer>2*3+6</answer>\nDone.", 1.0, 0.0),
        ("<answer>2*3\n+6</answer>", 1.0, 0.0),  # several lines
        ("<answer>1</answer> no, <answer>2*3+6</answer>", 1.0, 1.0),  # the last match
        ("<answer>2*3+6</answer> or <answer>2*3</answer>", 0.1, 0.1),
        ("<answer>2+3+6</answer>", 0.1, 0.1),  # a wrong value
        ("<answer>6+6</answer>", 0.1, 0.1),  # other numbers
        ("<answer>2*3+6+0</answer>", 0.1, 0.1),
        ("<answer>6/(2-2)</answer>", 0.1, 0.1),
        ("<answer>words</answer>", 0.0, 0.1),  # docs/traps.md 3: any tag earns format credit there
        ("<answer></answer>", 0.0, 0.1),  # docs/traps.md 31
        ("<answer>2*3+6", 0.0, 0.0),
        ("2*3+6", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_countdown_rules(completion, ours, paper):
    score = get_task("countdown").score
    assert score(completion, COUNTDOWN, format_score=0.1).value == ours
    assert score(completion, COUNTDOWN, format_score=0.1, rule="paper").value == paper


@pytest.mark.parametrize(
    ("text", "numbers", "target"), [("2**3", [2, 3], 8), ("7//2", [7, 2], 3), ("3//2*4", [3, 2, 4], 4)]
)
def test_powers_and_floor_division_are_not_reproduced(text, numbers, target):
    """The official grader gives 1.0 for these (docs/traps.md 31). Both rules refuse them: docs/rows.md names the difference."""
    row = Row("c", "", (), "", {"numbers": numbers, "target": target})
    for rule, value in (("unift", 0.0), ("paper", 0.1)):
        got = get_task("countdown").score(f"<answer>{text}</answer>", row, format_score=0.1, rule=rule)
        assert got.value == value and "cannot read" in got.note


def test_hint_that_holds_the_answer_earns_nothing():
    """docs/traps.md 1: only the completion is searched, under both rules."""
    for name in ("countdown", "knights"):
        row = ROWS[name][0]
        for rule in ("unift", "paper"):
            assert get_task(name).score("", row, hint=row.solution, format_score=0.1, rule=rule).value == 0.0


# ---------------------------------------------------------------------------------------------- knights


KNIGHTS = Row("k", "", (), "", {"names": ["Ann", "Bo"], "solution": [True, False], "statements": "()"})


@pytest.mark.parametrize(
    ("answer", "ours", "paper"),
    [
        ("(1) Ann is a knight\n(2) Bo is a knave", 1.0, 1.0),
        ("Bo is a knave, Ann is a knight.", 1.0, 1.0),
        ("Ann is a knight", 0.0, 0.1),  # one role word for two people
        ("Ann is a knight and Bo is a knight", 0.1, 0.1),
        ("Ann is a knight. Bo is a knave. Bo is a knight.", 0.0, 0.1),  # three role words
        ("Perhaps Ann is a knight and perhaps Bo is a knave", 0.0, 1.0),  # the official reading takes hedges
        ("no idea", 0.0, 0.1),  # docs/traps.md 3: unparsable, yet paid there
        ("", 0.0, 0.0),  # and an empty tag is not, unlike countdown's
    ],
)
def test_knights_rules(answer, ours, paper):
    score = get_task("knights").score
    for tail in ("", "\n", "\nThat is all."):  # the full text is searched: what follows does not matter
        text = f"<answer>Ann is a knave</answer> no: <answer> {answer} </answer>{tail}"
        assert score(text, KNIGHTS, format_score=0.1).value == ours
        assert score(text, KNIGHTS, format_score=0.1, rule="paper").value == paper
    assert score("Ann is a knight, Bo is a knave", KNIGHTS, format_score=0.1, rule="paper").value == 0.0


# ---------------------------------------------------------------------------------------------- chain


def left_to_right(text):
    """The value of a chain by its own rule, on Python's integers: bracket from the left and let Python calculate."""
    first, *rest = re.findall(r"\d+|[+*-]", text)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        first = f"({first}{sign}{number})"
    return eval(first)


@FUZZ
@given(st.integers(0, 2**40), OPTIONS["chain"])
def test_a_chain_is_calculated_from_the_left(seed, options):
    """Lines continue one another, each is true, none leaves the range, and the last result alone is right."""
    task = get_task("chain")
    (row,) = make_rows("chain", 1, seed, "train", **options)
    *before, text = row.prompt.splitlines()
    if options["example"]:
        problem, *worked = before[1:-1]
        assert worked[-1] == f"<answer>{left_to_right(problem.replace(' ', ''))}</answer>" and before[-1] == ""
        other = make_rows("chain", 1, seed + 1, "test", **options)[0]
        assert other.prompt.splitlines()[:-1] == before, "the same example for all rows"
    else:
        assert len(before) == 1
    lines = [re.split(r" ?([+*-]|=) ?", step.strip()) for step in row.steps]
    assert all(eval(a + sign + b) == int(c) and 0 <= int(c) <= 99 for a, sign, b, _, c in lines)
    assert [line[0] for line in lines[1:]] == [line[4] for line in lines[:-1]]
    assert "".join([lines[0][0], *(line[1] + line[2] for line in lines)]) == text.replace(" ", "")
    result = left_to_right(text)
    assert row.ending == f"<answer>{result}</answer>"
    for said, value in ((f" {result} ", 1.0), (f"+{result}", 1.0), (f"**{result}**", 1.0), (f"{result + 1}", 0.1),
                        (text, 0.0), (f"{result}.0", 0.0), (f"{result - 1}+1", 0.0)):  # fmt: skip
        assert task.score(f"<answer>{said}</answer>", row, format_score=0.1).value == value, said


def test_ranges_of_a_chain_that_hold_nothing_are_an_error():
    for options in ({"values": (50, 60), "signs": "*"}, {"signs": "/"}, {"signs": ""}, {"operations": 0}):
        with pytest.raises(ConfigError):
            make_rows("chain", 1, 0, "train", **options)


# ---------------------------------------------------------------------------------------------- lock


@FUZZ
@given(st.integers(0, 5), st.sampled_from("ABCDEFGHIJ"), st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_lock_accepts_the_table_and_nothing_else(number, key, codes):
    """Right exactly if every code is the table's under the key that was named, for every one of the ten keys."""
    from unift.rows.tasks.lock import code_table

    row = make_rows("lock", 6, 0, "train")[number] if number else ROWS["lock"][0]
    word, table = row.answer["letters"], code_table(row.answer["table_seed"])
    right = [int(table["abcdefghij".index(c), "ABCDEFGHIJ".index(key)]) for c in word]
    write = lambda codes: key + "".join(f"{c}{d}" for c, d in zip(word, codes, strict=True)) + "."  # noqa: E731
    score = get_task("lock").score
    assert score(write(right), row).value == 1.0
    assert score(write(codes), row).right == (codes == right)
    text = write(right)
    for cut in range(
        len(text)
    ):  # every hint with its rest is right; without the end mark, or without the rest, nothing is
        assert score(text[cut:], row, hint=text[:cut]).right
        assert not score("", row, hint=text[:cut]).right and not score(text[:cut], row).right


# ---------------------------------------------------------------------------------------------- jigsaw


def pixels_of(row):
    from PIL import Image

    (picture,) = row.images
    return np.asarray(Image.open(io.BytesIO(picture.data)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(2, 3), st.integers(2, 3), st.sampled_from(["own", "foreign"]))
def test_the_solution_of_a_jigsaw_mends_its_picture(seed, rows, cols, form):
    """Pillow's reading of the PNG, with each tile put at the place that its step names, is light above and warm left."""
    (row,) = make_rows("jigsaw", 1, seed, "train", rows=rows, cols=cols, form=form)
    shown, places = pixels_of(row).astype(float), [int(step[-1]) - 1 for step in row.steps]
    assert row.prompt.count("<image>") == 1 and shown.shape == (rows * 16, cols * 16, 3)
    assert [step[:-1] for step in row.steps] == (
        list("abcdefghi"[: rows * cols]) if form == "own" else [""] * rows * cols
    )
    tiles = shown.reshape(rows, 16, cols, 16, 3).swapaxes(1, 2).reshape(rows * cols, 16, 16, 3)
    mended = np.empty_like(tiles)
    mended[places] = tiles
    light, warm = mended.mean((1, 2, 3)).reshape(rows, cols), (mended[..., 0] - mended[..., 2]).mean((1, 2))
    assert (
        light[0].mean() > light[-1].mean()
        and warm.reshape(rows, cols)[:, 0].mean() > warm.reshape(rows, cols)[:, -1].mean()
    )


@pytest.mark.parametrize(("rows", "cols"), [(2, 3), (3, 2), (2, 2)])
def test_a_square_is_the_picture_and_grey_beside_it(rows, cols):
    """The same puzzle; what the picture does not cover is one grey."""
    options = {"rows": rows, "cols": cols, "tile": 8}
    plain, square = (get_task("jigsaw").make(0, 1, **options, square=square) for square in (False, True))
    height, width, edge = 8 * rows, 8 * cols, 8 * max(rows, cols)
    shown, rest = pixels_of(square), np.ones((edge, edge), bool)
    rest[:height, :width] = False
    assert shown.shape == (edge, edge, 3) and square.steps == plain.steps
    assert (shown[:height, :width] == pixels_of(plain)).all() and (shown[rest] == 128).all()


@FUZZ
@given(st.permutations("1234"), st.sampled_from(["own", "foreign"]))
def test_jigsaw_accepts_its_permutation_and_nothing_else(said, form):
    """Right exactly if every tile is at its place; the share of right tiles is a part; cut anywhere, a hint and its rest are right."""
    score, (row,) = get_task("jigsaw").score, make_rows("jigsaw", 1, 5, "train", form=form)
    order, text = row.answer["order"], "".join(row.steps)
    write = lambda digits: "".join(f"{'abcdefghi'[i] if form == 'own' else ''}{d}" for i, d in enumerate(digits)) + "."  # noqa: E731
    got = score(write(said), row, format_score=0.1)
    share = sum(int(d) == place for d, place in zip(said, order, strict=True)) / 4
    assert (got.value, got.parts["tiles"]) == (1.0 if share == 1 else 0.1, share)
    for bad in (said[:3], [*said, "1"], ["1", *said[1:3], "1"], ["0", *said[1:]]):  # too few, too many, twice, none
        assert score(write(bad), row, format_score=0.1).value == 0.0
    other = write(order) if form == "foreign" else "".join(map(str, order)) + "."
    assert score(other, row).right == (form == "foreign")
    for cut in range(len(text) + 1):
        assert score(text[cut:] + ".", row, hint=text[:cut]).right and not score("", row, hint=text[:cut]).right
        assert not score(text[cut:], row, hint=text[:cut]).right


@pytest.mark.parametrize("kind", ["colour", "shape", "half"])
def test_older_tasks_have_one_right_word(kind):
    from unift.rows.tasks.jigsaw import WORDS

    rows, score = make_rows("jigsaw", 60, 0, "train", kind=kind), get_task("jigsaw").score
    assert {row.answer["word"] for row in rows} == set(WORDS[kind])
    for row in rows[:8]:
        for word in WORDS[kind]:
            assert score(f"{word}.", row, format_score=0.1).value == (1.0 if word == row.answer["word"] else 0.1)
        assert (
            score(row.answer["word"], row, format_score=0.1).value == score("no.", row, format_score=0.1).value == 0.0
        )


def test_a_jigsaw_is_a_function_of_its_address():
    """The same row again, another for another address; form changes the solution and not the problem."""
    task = get_task("jigsaw")
    one, again, other = task.make(3, 7), task.make(3, 7), task.make(3, 8)
    assert (
        (one, one.images[0].data) == (again, again.images[0].data) and one.images != other.images and one.id != other.id
    )
    assert task.canonical(task.make(3, 7, form="foreign")) == task.canonical(one)
    for options in (
        {"rows": 1},
        {"cols": 4, "rows": 3},
        {"tile": 2},
        {"form": "x"},
        {"kind": "x"},
        {"rows": True},
        {"square": 1},
    ):
        with pytest.raises(ConfigError, match="jigsaw"):
            make_rows("jigsaw", 1, 0, "train", **options)


# ---------------------------------------------------------------------------------------------- math


MATH = Row("m", "q", (), "", "42", task="math")


@pytest.mark.parametrize(
    ("completion", "ours", "paper"),
    [
        ("<answer>42</answer>", 1.0, 1.0),
        ("<answer>$42$.</answer>", 1.0, 0.1),
        ("<answer>42</answer>\n", 1.0, 0.0),
        ("<answer>41</answer>", 0.1, 0.1),
        ("<answer></answer>", 0.0, 0.1),
        ("<answer>42.0</answer>", 1.0, 0.1),  # text only under the paper's rule for MATH
        (r"\boxed{42}", 0.0, 0.0),
    ],
)
def test_math_rules(completion, ours, paper):
    score = get_task("math").score
    assert score(completion, MATH, format_score=0.1).value == ours
    assert score(completion, MATH, format_score=0.1, rule="paper").value == paper


# ---------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", GENERATED)
def test_splits_are_disjoint_for_any_seed_and_options(name):
    """The split is a function of the canonical form alone, so rows of any two calls keep apart; and every row is right."""
    task = get_task(name)

    @settings(max_examples=12, deadline=None)
    @given(st.integers(0, 2**40), st.integers(0, 2**40), OPTIONS[name])
    def check(one, other, options):
        train = make_rows(name, 12, one, "train", **options)
        test = make_rows(name, 6, other, "test", exclude=train, **options)
        assert {split_of(task.canonical(r)) for r in train} == {"train"}
        assert {split_of(task.canonical(r)) for r in test} == {"test"}
        forms = [task.canonical(r) for r in (*train, *test)]
        assert len(set(forms)) == len(forms)
        assert all(task.score(r.solution, r).right for r in (*train, *test))

    check()
