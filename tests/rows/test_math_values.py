"""Formulas and their values: exact comparison as properties, caps before any work, hostile text."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spellings import TARGETS, right
from test_math import equal, judged

from unift.rewards.pool import Scorer
from unift.rows.tasks import get_task
from unift.rows.tasks import reading as readings
from unift.rows.tasks.equality import same
from unift.rows.tasks.formula import FormulaError, parse_formula
from unift.rows.tasks.kinds import Unreadable
from unift.rows.tasks.math import unreadable_targets
from unift.rows.tasks.reading import MAX_NESTED, MAX_TEXT, read
from unift.rows.tasks.values import equal_trees, evaluate
from unift.types import Row

FUZZ = settings(max_examples=150, deadline=None)


# ---------------------------------------------------------------------------------------------- exactness

fractions = st.fractions(min_value=-1000, max_value=1000, max_denominator=500)


def written(value, form):
    """A fraction in one of five spellings."""
    n, d = value.numerator, value.denominator
    sign, n = ("-" if n < 0 else ""), abs(n)
    if form == 1 and n > d > 1:
        return f"{sign}{n // d} {n % d}/{d}"
    return [
        f"{sign}{n}/{d}",
        f"{sign}\\frac{{{3 * n}}}{{{3 * d}}}",
        f"\\dfrac{{{sign}{n}}}{{{d}}}",
        f"${sign}{n} \\div {d}$",
    ][form % 4]


@FUZZ
@given(fractions, fractions, st.integers(0, 4), st.integers(0, 4))
def test_fractions_are_equal_exactly_if_their_values_are(a, b, one, other):
    assert equal(written(a, one), written(a, other))
    assert equal(written(a, one), written(b, other)) == (a == b)


@FUZZ
@given(st.integers(-(10**30), 10**30), st.integers(1, 40))
def test_neighbours_of_large_and_tiny_numbers_differ(n, zeros):
    assert equal(str(n), f"{n}.0") and not equal(str(n), str(n + 1))
    assert not equal(f"{n}e-{zeros}", f"{n + 1}e-{zeros}")
    assert equal(f"{n}e-{zeros}", f"{n} \\times 10^{{-{zeros}}}")


coefficients = st.lists(st.integers(-9, 9), min_size=3, max_size=3)


@FUZZ
@given(coefficients, coefficients)
def test_polynomials_are_equal_exactly_if_their_coefficients_are(p, q):
    """a + bx + cx^2, and Horner's form of the same."""
    plain = lambda c: f"{c[0]} + ({c[1]})x + ({c[2]})x^2"  # noqa: E731
    nested = lambda c: f"{c[0]} + x(({c[2]}) x + ({c[1]}))"  # noqa: E731
    assert equal(plain(p), nested(p))
    assert equal(plain(p), nested(q)) == (p == q)


@FUZZ
@given(st.integers(2, 400), st.integers(2, 400), st.integers(1, 30), st.integers(1, 30))
def test_roots_are_equal_exactly_if_their_squares_are(a, b, m, n):
    """m sqrt(a) = n sqrt(b) if and only if m^2 a = n^2 b."""
    assert equal(f"{m}\\sqrt{{{a}}}", f"{n}√{b}") == (m * m * a == n * n * b)


@FUZZ
@given(st.integers(2, 10**6), st.integers(2, 10**6), st.integers(4, 12))
def test_decimals_stand_for_an_exact_value_only_with_six_digits(n, d, places):
    """The decimal is the value rounded to so many places; it is right if that is exact, or has six significant digits."""
    value = Fraction(n, d)
    rounded = round(value, places)
    digits = str(abs(rounded.numerator * 10**places // rounded.denominator))
    text = f"{rounded.numerator * 10**places // rounded.denominator / 10**places:.{places}f}"
    assume(Fraction(text) == rounded and rounded != 0)
    assert equal(f"\\frac{{{n}}}{{{d}}}", text) == (rounded == value or len(digits) >= 6)
    worse = f"{float(Fraction(text) + Fraction(2, 10**places)):.{places}f}"
    assert not equal(f"\\frac{{{n}}}{{{d}}}", worse) or Fraction(worse) == value


SPELLED = sorted({text for targets in TARGETS.values() for target in targets for text in (target, *right(target))})


@FUZZ
@given(st.sampled_from(SPELLED))
def test_equality_is_reflexive(text):
    assert same(read(text), read(text))


@FUZZ
@given(st.sampled_from(sorted(t for ts in TARGETS.values() for t in ts)), st.data())
def test_spellings_of_one_answer_are_equal_in_both_directions(target, data):
    one, other = data.draw(st.sampled_from(right(target))), data.draw(st.sampled_from(right(target)))
    units = re.compile(r"%|percent|circ|text|mathrm|[a-z]{4,}|\$\d|\\\$")
    assume(not (units.search(one) and units.search(other)))  # two different units do not agree with one another
    assert same(read(one), read(other)) and same(read(other), read(one))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("0", r"\sin \pi", True),
        ("0", r"e^{-500}", False),  # no number is small enough to be 0
        ("0", r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}", True),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
        (r"\frac{1}{2004!} + e^{-9}", r"\frac{1}{2006!} + e^{-9}", True),  # a relative difference of 1e-5748
        (r"\sqrt{2}", r"\sqrt{2} + 10^{-40}", False),
        (r"\sin x", r"\sin x + 10^{-30} x", False),
        (r"\log(xy)", r"\log x + \log y", False),  # not where both are negative
        (r"\sqrt{x^2}", "|x|", True),
        ("f(x+1)", "f(1+x)", True),
        ("f(2x)", "2f(x)", False),
        (r"\log 100", "2", True),  # the base that is left out may be ten
        (r"\log 13", r"\ln 13", True),
        (r"\log 13", r"\log_2 13", False),
        (r"\sqrt[3]{-8}", "-2", True),
        (r"\binom{n}{2}", r"\frac{n^2-n}{2}", True),
        ("(-1)^{1/2}", "i", True),
    ],
)
def test_values(one, other, expected):
    assert equal_trees(parse_formula(one), parse_formula(other)) is expected


def test_the_value_of_a_formula():
    """Constants against the standard library, to its precision."""
    for text, value in {
        r"\frac{1+\sqrt{5}}{2}": (1 + math.sqrt(5)) / 2,
        r"2\cos 15^{\circ}": 2 * math.cos(math.pi / 12),
        r"\log_2 10 \cdot \ln 2": math.log(10),
        r"\arctan 1 + \tan^{-1} 1": math.pi / 2,
        "e^{-0.5}": math.exp(-0.5),
        r"\sinh 2": math.sinh(2),
        r"4! \binom{7}{3}": 24 * 35,
        "2^{-3^2}": 2**-9,
        "-2^2": -4,
        "1/2*3": 1.5,
        "7 - 3 - 2": 2,
        r"\lfloor -2.5 \rfloor + \lceil 2.1 \rceil": 0,
    }.items():
        assert math.isclose(float(evaluate(parse_formula(text))), value, rel_tol=1e-14), text


# ---------------------------------------------------------------------------------------------- caps


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1" * (MAX_TEXT + 1), f"at most {MAX_TEXT}"),
        ("(" * (MAX_NESTED + 1) + "1", "nested deeper"),
        ("{" * 900, "nested deeper"),
        (r"\frac{" * 150, "nested deeper"),
    ],
)
def test_long_and_deep_texts_are_refused_unread(monkeypatch, text, reason):
    """Before anything looks at them: the first thing that would is made to fail."""
    monkeypatch.setattr(readings, "spelled", lambda text: pytest.fail("read"))
    with pytest.raises(Unreadable, match=reason):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}",
        "10^{10^{10}}",
        "9**9**9**9",
        "99999999!",
        "(2500!)^{2500}",
        "1e99999",
        "x!!",
        "2^{2^{2^{2^{2^{2}}}}}",
        r"\sin(10^{99})",
    ],
)
def test_large_numbers_are_refused_unevaluated(text):
    """They equal themselves, as text and as formula, and nothing else; no digit of them is computed."""
    row = Row("m", "q", (), "", text, task="math")
    assert get_task("math").score(f"<answer>{text}</answer>", row).right
    assert not equal(text, text + "+1") and not equal("42", text) and not equal(f"42+0*{text}", "42")


def test_code_is_no_formula(tmp_path):
    written = tmp_path / "written"
    for text in (f"__import__('pathlib').Path('{written}').touch()", "exec('1')", "().__class__", "lambda: 1"):
        assert not equal("42", text)
    assert not written.exists()


def test_hostile_answers_in_a_worker():
    """No exception and no timeout: every one is judged, and the next right answer is paid."""
    row = Row("m", "q", (), "", "42", task="math")
    hostile = [
        "9^9^9^9",
        "{" * 900,
        "\\" * 500,
        "\x00",
        "42" * 400,
        r"\boxed{\boxed{",
        "41, 42, 43",
        r"\frac{1}{0}",
        "0^0",
        r"\sum_{n=1}^{10^9} n",
    ]
    texts = [f"<answer>{text}</answer>" for text in (*hostile, "42")]
    with Scorer("math", workers=1, timeout=4.0, error_rate=0.0) as scorer:
        outcomes = scorer.score([row] * len(texts), texts)
    assert [o.value for o in outcomes] == [0.0] * len(hostile) + [1.0]


PIECES = ["\\frac{", "\\sqrt{", "}", "{", "(", ")", "[", "^", "_", "10", "1/3", "x", "\\pi", "\\infty", "+", "-", "=", "<", ",", " and ", "\\cup", "\\pm",
          "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\text{ cm}", "$", "\\boxed{", "%", "\\circ", "\\sin", "!", ":", " ", "people", "**", "|",
          "1,000", "\\left(", "½", "\n", "'", "é", "或", "\\", "\\{", "\\}", "\\mid", "U", "d", "#"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_any_text_is_read_or_refused(text):
    try:
        found = read(text)
    except Unreadable as error:
        assert str(error)
        return
    assert found and same(found, found) in (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        "1 2",
        "x +",
        "1/",
        "\\frac{1}",
        "2^",
        "|x",
        "sin",
        "1.2.3",
        "x'_",
        "a_{b",
        "\\unknown x",
        "3 \\frac{5}{2}",
        "2!!",
    ],
)
def test_refused_formulas(text):
    with pytest.raises(FormulaError):
        parse_formula(text)


def test_targets_that_cannot_be_read_are_listed():
    """By row, with the reason; the same text is still right."""
    golds = ["42", "$f(x)=ax+b$, where $a,b$ are integers", r"2, 4, \ldots, 2n", r"\int_0^1 x dx"]
    rows = [Row(f"r{i}", "q", (), "", gold, task="math") for i, gold in enumerate(golds)]
    assert [(number, row_id) for number, row_id, _, reason in unreadable_targets(rows) if reason] == [
        (2, "r1"),
        (3, "r2"),
        (4, "r3"),
    ]
    for gold in golds:
        assert equal(gold, gold)
    got = judged(golds[1], "f(x)=ax+b")
    assert not got.right and "target cannot be read" in got.note
