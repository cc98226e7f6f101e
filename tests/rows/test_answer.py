"""Where an answer stands, one rule a run, and the official rules of the paper's own graders."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unift.config.resolve import parse_overrides, resolve
from unift.rewards.pool import Scorer
from unift.rows.tasks import get_task, make_rows
from unift.rows.tasks.answer import PLACES, extract_answer, unwrapped
from unift.rows.tasks.format import answer_rule, check_format, meant_right
from unift.types import ConfigError, Row

FUZZ = settings(max_examples=150, deadline=None)


def problem(solution, answer="42", task="math", row_id="r"):
    return Row(row_id, "q", (solution,), "", answer, task=task)


# ---------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("place", "text", "answer"),
    [
        ("tags", "<answer> 42 </answer>", "42"),
        ("tags", r"\boxed{42}", None),
        ("boxed", r"so \boxed{41}, no: \boxed{42}.", "42"),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed {42}", "42"),
        ("boxed", r"\fbox{7} and \boxed{42", "7"),  # the last one does not close
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        ("boxed", r"\boxed{}", None),
        ("boxed", "<answer>42</answer> boxed{42}", None),
        ("hash", "6*7 = 42\n#### 42", "42"),
        ("hash", "#### 41\n#### 42\nthat is it", "42"),
        ("hash", "#### $42", "$42"),
        ("hash", "####", None),
        ("hash", "### 42", None),
        ("last_number", "first 41, then 42.", "42"),
        ("last_number", "it is -3.5", "-3.5"),
        ("last_number", "x = 1,000 dollars", "1,000"),
        ("last_number", "about 3/4 of it", "3/4"),
        ("last_number", "nothing", None),
    ],
)
def test_places(place, text, answer):
    assert extract_answer(text, place) == answer


@FUZZ
@given(
    st.lists(st.sampled_from(["\\boxed", "{", "}", "\\{", "\\}", "\\", "a", "\\fbox", " "]), max_size=25).map("".join)
)
def test_a_box_is_the_last_that_balances(text):
    """Against a search from every opening for the first brace at which the count is 0 again."""
    found = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth, i = 0, match.end() - 1
        while i < len(text):
            if text[i] == "\\":
                i += 2
                continue
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                found = text[match.end() : i].strip()
                break
            i += 1
    assert extract_answer(text, "boxed") == (found or None)


@FUZZ
@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["It is {}.", "{} apples", "so {}", "({})", "= {}\n", "**{}**", "${}$"]),
)
def test_the_last_number_is_found_in_sentences(n, sentence):
    said = extract_answer("After 17 steps: " + sentence.format(n), "last_number")
    assert said is not None and int(said.replace("$", "").replace(",", "")) == n


@pytest.mark.parametrize("place", PLACES)
def test_long_texts_cost_no_more_than_their_length(place):
    """Signs that open and never close, a hundred thousand of them: a quadratic search would take minutes."""
    for text in ("\\boxed{" * 30_000, "{" * 200_000, "1" * 200_000, "<answer>" * 30_000, "#" * 200_000, "1," * 100_000):
        extract_answer(text, place)


@pytest.mark.parametrize(
    ("place", "text"), [("tags", "<answer>{}</answer>"), ("boxed", "\\boxed{{{}}}"), ("hash", "#### {}")]
)
@pytest.mark.parametrize("name", ["countdown", "knights"])
def test_every_task_reads_every_place(name, place, text):
    row = make_rows(name, 1, 0, "train")[0]
    answer = re.search(r"<answer>(.*?)</answer>", row.ending, re.DOTALL)[1].strip().replace("\n", ", ")
    score = get_task(name).score
    assert score(text.format(answer), row, answer=place).right
    other = next(p for p in PLACES if p != place)
    got = score(text.format(answer), row, answer=other)
    assert not got.right and (got.parts["no_answer"] == 1.0 or other == "last_number")


def test_completions_without_an_answer_are_counted():
    score = get_task("math").score
    row = problem("")
    assert score("42", row).parts["no_answer"] == 1.0
    assert score("<answer>41</answer>", row).parts["no_answer"] == 0.0
    with Scorer("math", answer="boxed") as scorer:
        outcomes = scorer.score([row] * 3, [r"\boxed{42}", r"\boxed{41}", "<answer>42</answer>"])
    assert [(o.value, o.parts["no_answer"]) for o in outcomes] == [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("text", "bare"),
    [("**2*3**", "2*3"), ("`$2+3$`", "2+3"), ("$2$ or $3$", "$2$ or $3$"), (r"\boxed{2}+\boxed{3}",) * 2],
)
def test_markup_around_an_answer(text, bare):
    assert unwrapped(text) == bare


# ---------------------------------------------------------------------------------------------- one rule a run


@pytest.mark.parametrize(
    ("solution", "place"),
    [
        (r"6*7 is \boxed{42}", "boxed"),
        ("6*7 = 42\n#### 42", "hash"),
        (r"it is \boxed{42}. </think> <answer> 42 </answer>", "tags"),  # both: tags come first
        ("6*7 gives 42", "last_number"),
        ("forty-two", "tags"),
    ],
)
def test_auto_is_what_the_solutions_use(solution, place):
    rows = [problem(solution, row_id=str(i)) for i in range(3)]
    assert answer_rule(rows) == place
    assert answer_rule(rows, "hash") == "hash"
    assert answer_rule(rows, "auto", "paper") == "tags"
    got = get_task("math").score(solution, rows[0], answer=place)
    assert got.right == (place != "tags" or "<answer>" in solution)


def test_auto_is_one_rule_for_all_rows():
    """The majority decides; rows without a solution and of other tasks have no vote."""
    boxed, hashed = problem(r"\boxed{42}"), problem("#### 42")
    assert answer_rule([hashed, boxed, boxed, problem(""), problem("#### 42", task="mine")]) == "boxed"
    assert answer_rule([]) == answer_rule([problem("")]) == "tags"
    assert answer_rule(make_rows("countdown", 3, 0, "train")) == "tags"


def test_a_format_mismatch_is_an_error():
    rows = [problem(r"it is \boxed{42}")] * 4
    check_format(rows, answer="boxed")
    check_format(rows, function="mine.py:score", answer="tags")  # not ours to judge
    check_format([problem("")], answer="tags")
    with pytest.raises(
        ConfigError, match=r"0 of the 4 solutions .*reward.answer=tags.*\('?r'?|reward.answer=boxed accepts 4"
    ):
        check_format(rows, answer="tags")
    with pytest.raises(ConfigError, match="reward.answer=boxed accepts 4"):
        check_format(rows, answer="tags")
    with pytest.raises(ConfigError, match="mend the solutions"):
        check_format([problem("forty-two")] * 2, answer="tags")
    for part in ("math", SimpleNamespace(function="math", weight=0.5)):
        check_format(rows, function=["mine.py:score", part], answer="boxed")
        with pytest.raises(ConfigError, match="reward.answer=boxed accepts 4"):
            check_format(rows, function=["mine.py:score", part], answer="tags")
    check_format([*rows, problem("none")], answer="boxed")  # one row that is wrong is not a mismatch
    graded = [replace(problem(r"\boxed{41}"), extra={"score": s}) for s in (0.2, False, 0)]
    graded.append(replace(problem(r"\boxed{42}"), extra={"score": None}))
    check_format(meant_right(graded, "score"), answer="boxed")  # wrong answers that are said to be wrong
    with pytest.raises(ConfigError, match="1 of the 4 solutions"):
        check_format(meant_right(graded, None), answer="boxed")


def test_unknown_places_are_errors():
    with pytest.raises(ConfigError, match="reward.answer='box' names no place"):
        extract_answer("x", "box")
    with pytest.raises(ConfigError, match="decide it once for the run"):
        get_task("math").score("x", problem(""), answer="auto")
    with pytest.raises(ConfigError, match="reads answer tags"):
        answer_rule([], "boxed", "paper")
    with pytest.raises(ConfigError, match="reads answer tags"):
        get_task("math").score("x", problem(""), rule="paper", answer="boxed")
    with pytest.raises(ConfigError, match="reward.answer"):
        resolve(recipe="lock", overrides=parse_overrides(["reward.answer=box"]))


# ---------------------------------------------------------------------------------------------- the official rules


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("x=5", "5", True),
        ("k = 5", "5", True),
        ("n_1=5", "5", False),  # more than two signs before the sign of equality
        (r"5\%", "5", True),
        (r"90^\circ", "90", True),
        (r"5\text{ cm}", "5", True),
        (r"5\text{cm}", "5", False),
        (r"\$5", "5", True),
        ("$5$", "5", False),
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        (".5", r"\frac12", True),
        ("0.50", r"\frac12", False),
        (r"\frac14", r"\frac{1}{4}", True),
        (r"\dfrac1{72}", r"\frac{1}{72}", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        ("2/4", "1/2", False),
        ("x/2", r"\frac{x}{2}", False),  # neither side is edited
        (r"5\text{ a}\text{ b}", r"5\text{ a}\text{ b}", True),
        (r"\left(1, 2\right)", "(1,2)", True),
        ("1,000", "1000", False),
    ],
)
def test_the_paper_compares_text_after_its_edits(answer, target, right):
    row = Row("r", "q", (), "", {"question": "q", "target": target}, "math", {"data_source": "math500"})
    got = get_task("math").score(f"so <answer> {answer} </answer>", row, rule="paper", format_score=0.1)
    assert got.value == (1.0 if right else 0.1)


@pytest.mark.parametrize("source", ["openai/gsm8k", "aime", "amc"])
@pytest.mark.parametrize(
    ("answer", "right"),
    [("42", True), ("42.000001", True), ("42.1", False), ("4.2e1", True), ("$42", False), ("nan", False)],
)
def test_the_paper_compares_numbers_of_three_sources(source, answer, right):
    row = Row("r", "q", (), "", {"question": "q", "target": "42.0"}, "math", {"data_source": source})
    assert get_task("math").score(f"<answer>{answer}</answer>", row, rule="paper").right is right
    assert not get_task("math").score(f"<answer>{answer}</answer>\n", row, rule="paper").right


COUNTDOWN = Row("c", "", (), "", {"numbers": [2, 3, 6], "target": 12})


@pytest.mark.parametrize(
    ("text", "ours", "paper"),
    [
        ("+2*3+6", 1.0, 1.0),
        ("2.*3.+6", 1.0, 1.0),
        ("- -2*3+6", 1.0, 1.0),
        ("2*3+6.", 1.0, 1.0),
        ("2 × 3 + 6", 1.0, 0.1),
        (r"$2 \times 3 + 6$", 1.0, 0.1),
        ("`2*3+6`", 1.0, 0.1),
        ("**2*3+6**", 1.0, 0.1),
        ("2*3+06", 0.0, 0.1),
        ("2*3+6 = 12", 0.0, 0.1),
    ],
)
def test_countdown_spellings(text, ours, paper):
    score = get_task("countdown").score
    assert score(f"<answer>{text}</answer>", COUNTDOWN, format_score=0.1).value == ours
    assert score(f"<answer>{text}</answer>", COUNTDOWN, format_score=0.1, rule="paper").value == paper


def test_countdown_decimals_are_the_paper_s():
    """Its digits count as numbers used, so 0.5 is right where 0 and 5 are given; within 1e-5 is equal."""
    row = Row("c", "", (), "", {"numbers": [0, 5, 4], "target": 2})
    for rule, value in (("unift", 0.0), ("paper", 1.0)):
        assert get_task("countdown").score("<answer>0.5*4</answer>", row, format_score=0.0, rule=rule).value == value
    near = Row("c", "", (), "", {"numbers": [1, 300000, 5], "target": 5})
    for rule, value in (("unift", 0.0), ("paper", 1.0)):
        assert get_task("countdown").score("<answer>5+1/300000</answer>", near, rule=rule).value == value


KNIGHTS = Row("k", "", (), "", {"names": ["Ann", "Bo"], "solution": [True, False], "statements": "()"})


@pytest.mark.parametrize(
    ("text", "ours", "paper"),
    [
        ("Ann is a Knight, Bo is a KNAVE", 1.0, 1.0),
        ("Ann  is\ta knight\nBo is  a knave", 1.0, 1.0),
        ("**Ann** is a knight, **Bo** is a `knave`", 1.0, 0.1),
        ("`Ann is a knight, Bo is a knave`", 1.0, 1.0),
        ("Ann is a knight, Bo is a knave, knightly", 0.0, 0.1),  # three role words, one inside another word
        ("ann is a knight, bo is a knave, I think", 0.0, 1.0),
        ("Ann is a knight or Ann is a knave", 0.0, 0.1),
    ],
)
def test_knights_spellings(text, ours, paper):
    score = get_task("knights").score
    assert score(f"<answer>{text}</answer>", KNIGHTS, format_score=0.1).value == ours
    assert score(f"<answer>{text}</answer>", KNIGHTS, format_score=0.1, rule="paper").value == paper
