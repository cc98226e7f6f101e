"""The verifier of mathematics: what equals what, by kind, and in the spellings of real targets."""

from __future__ import annotations

import json

import pytest
from spellings import TARGETS, right, wrong

from unift.rows.readers import read_rows
from unift.rows.tasks import get_task
from unift.rows.tasks.math import unreadable_targets
from unift.types import Row


def judged(target, answer):
    return get_task("math").score(f"<answer>{answer}</answer>", Row("m", "q", (), "", target, task="math"))


def equal(target, answer):
    return judged(target, answer).right


# ---------------------------------------------------------------------------------------------- kinds

RIGHT = [
    (r"18", [r"18 dollars per day", r"$18 per day", r"\$18", r"USD 18", r"18.00", r"eighteen"]),
    (r"540", [r"540 meters"]),
    (r"3", [r"3 bolts of fabric", r"+3", r"3"]),
    (r"70000", [r"$70,000", r"70,000 dollars profit"]),
    (r"20", [r"20 cups of feed"]),
    (r"64", [r"$64.00 total"]),
    (r"8", [r"8 people.", r"8 ways"]),
    (r"\frac{3}{4}", [r"0.75", r"75\%"]),
    (r"75\%", [r"0.75", r"\frac{3}{4}"]),
    (r"0.75", [r"3/4"]),
    (r"2:3", [r"2 to 3"]),
    (r"1:1", [r"1 : 1"]),
    (r"\frac{1}{2}", [r"½"]),
    (r"\frac{3}{2}", [r"1½"]),
    (r"2\sqrt{3}", [r"2√3", r"2*3^(1/2)", r"2\cdot\sqrt{3}"]),
    (r"2\sqrt3", [r"\sqrt{12}"]),
    (r"\frac{\sqrt{3}}{2}", [r"√3/2"]),
    (r"x^2+1", [r"x² + 1", r"1+x^2"]),
    (r"(x+1)(x-1)", [r"x^2-1"]),
    (r"5x^3", [r"5x³"]),
    (r"\pi", [r"3.14159265"]),
    (r"14\pi", [r"43.9822971502571"]),
    (r"\infty", [r"∞"]),
    (r"-\infty", [r"-infinity"]),
    (r"(-\infty,3]", [r"x \le 3", r"x ≤ 3", r"{x | x ≤ 3}", r"\{x \mid x \le 3\}", r"(-∞, 3]"]),
    (r"(-\infty,-1)\cup(1,\infty)", [r"x<-1 or x>1", r"x < -1 \text{ or } x > 1"]),
    (r"(1,2)", [r"(1, 2)", r"1<x<2"]),
    (r"[0,1]", [r"0 \le x \le 1", r"0 <= x <= 1"]),
    (r"\{1,2\}", [r"{1, 2}", r"1, 2"]),
    (r"1,2", [r"\{1,2\}", r"x = 1 or x = 2", r"x=1, x=2", r"x = 1, 2", r"x_1 = 1, x_2 = 2", r"1 and 2"]),
    (r"1,-1", [r"\pm 1", r"±1", r"x = \pm 1"]),
    (r"2+\sqrt{3},2-\sqrt{3}", [r"2 \pm \sqrt{3}"]),
    (r"\pm 1", [r"1, -1"]),
    (r"3+4i", [r"4i+3", r"3 + 4 i"]),
    (r"-8 + 2i", [r"2i - 8"]),
    (r"y = 2x + 3", [r"y=2x+3", r"2x - y + 3 = 0", r"2x+3"]),
    (r"f(x) = x^2", [r"x^2"]),
    (r"11x + 6y + 5z + 86 = 0", [r"11x+6y+5z=-86"]),
    (r"\text{Tuesday}", [r"tuesday", r"\textbf{Tuesday}"]),
    (r"Yes", [r"yes"]),
    (r"\text{no solution}", [r"No solution"]),
    (r"\text{(B)}", [r"B", r"(B)"]),
    (r"B", [r"\text{B}", r"B.", r"Option B", r"**B**"]),
    (r"\text{C, F, H}", [r"C, F, and H", r"F, C, H"]),
    (r"4130_5", [r"4130_{5}", r"4130_{five}", r"4130 base 5", r"(4130)_5", r"4130_{\text{five}}"]),
    (r"AB3_{16}", [r"AB3_{16}"]),
    (r"10^{-3}", [r"0.001", r"10^-3", r"1e-3"]),
    (r"6.1 \times 10^{-9}", [r"6.1e-9", r"6.1×10⁻⁹"]),
    (r"1.70e4", [r"17000", r"1.70 \times 10^4 \text{ m}"]),
    (r"2.75e11", [r"2.75 \times 10^{11} \, \text{m}"]),
    (r"5\text{ cm}", [r"5 cm", r"5 centimeters", r"5\,\text{cm}"]),
    (r"10\text{ cm}^2", [r"10 square centimeters"]),
    (r"99\pi \text{ square inches}", [r"99\pi in^2"]),
    ('90\\text{ square\nunits}', [r"90", r"90 square units"]),
    (r"120^\circ", [r"120", r"120°", r"120 degrees"]),
    (r"\frac{\pi}{2}", [r"90^\circ"]),
    (r"2^{2005}", [r"2^{2005}", r"2**2005", r"2 \cdot 2^{2004}"]),
    (r"\frac{1}{2004!}", [r"1/2004!"]),
    (r"11 \frac{2}{3}", [r"35/3", r"11 2/3"]),
    (r"\log_2 3", [r"\frac{\ln 3}{\ln 2}", r"log_2(3)"]),
    (r"\sin 3x", [r"sin(3x)"]),
    (r"2 \tan x", [r"2tan(x)"]),
    (r"\sin^2 x", [r"1-\cos^2 x"]),
    (r"\cos 13^\circ", [r"cos(13°)"]),
    (r"2\cos 15^{\circ}", [r"\frac{\sqrt{6}+\sqrt{2}}{2}"]),
    (r"\begin{pmatrix} 1 \\ 7 \end{pmatrix}", [r"\begin{bmatrix}1\\7\end{bmatrix}", r"(1,7)", r"[[1],[7]]"]),
    (r"\begin{pmatrix} 1/2 \\ 1/2 \end{pmatrix}", [r"\frac{1}{2}\begin{pmatrix}1\\1\end{pmatrix}"]),
    (r"\begin{pmatrix} 7 & 1 \\ -1 & -3 \end{pmatrix}", [r"[[7, 1], [-1, -3]]",
        r"\left[\begin{array}{cc}7&1\\-1&-3\end{array}\right]"]),
    (r"6:15", [r"6:15"]),
    (r"2:15 PM", [r"2:15 p.m."]),
    (r"2:15", [r"2:15 PM"]),
    (r"0.\overline{3}", [r"1/3", r"\frac13"]),
    (r"0.36", [r"36\%"]),
    (r"\emptyset", [r"∅"]),
    (r"70,110", [r"70, 110", r"110 and 70"]),
    (r"7, -2, \text{ and } -5", [r"-5, -2, 7"]),
    (r"1, -3", [r"{-3, 1}"]),
    (r"\frac{3}{2} + \frac{3}{2} i", [r"\frac{3+3i}{2}"]),
    (r"42", [r"The answer is **42**.", r"Therefore, the final answer is $\boxed{42}$.", r"There are 42 ways",
        r"x = 42", r"6 * 7 = 42", r"\text{Answer: } 42", r"**Answer:** 42", r"Answer: \boxed{42}",
        r"\text{The area is } 42", r"42\text{ units}^2"]),
    (r"-4", [r"(-4)"]),
    (r"5k", [r"5 k"]),
    (r"7p+4e", [r"4e + 7p"]),
    (r"-x^3", [r"-x³"]),
    (r"\$7.50", [r"7.50", r"$7.50", r"7.5 dollars"]),
    (r"\sqrt{34}", [r"\sqrt{34} \approx 5.83"]),
    (r"\frac{1}{3}", [r"0.333333"]),
    (r"\frac{2}{3}", [r"0.666667"]),
    (r"4 \times 10^8", [r"400 million"]),
    (r"3000000", [r"3 million"]),
    (r"\frac{n(n+1)}{2}", [r"n(n+1)/2"]),
    (r"\binom{n}{2}", [r"\frac{n(n-1)}{2}"]),
    (r"n!", [r"n!"]),
    (r"\frac{2\pi c}{\lambda}", [r"2πc/λ"]),
    (r"x \in [1,2]", [r"[1,2]"]),
    (r"x\ne 3", [r"x \neq 3"]),
    (r"\mathbb{R}", [r"(-\infty,\infty)"]),
    (r"(3,4)", [r"(x,y) = (3,4)", r"x=3, y=4"]),
    (r"8 \text{ and } 9", [r"8, 9"]),
    (r"25", [r"25 minutes", r"25% of the total"]),
    (r"15", [r"15 sq. units", r"15 cm²", r"15cm", r"15 km/h"]),
    (r"12\text{ degrees}", [r"12^\circ"]),
    (r"5.4 \text{ cents}", [r"5.4 cents", r"5.4¢"]),
    (r"9 \text{ multiples}", [r"9 multiples"]),
    (r"2\hat{x}+3\hat{y}", [r"3\hat{y} + 2\hat{x}"]),
    (r"\text{odd}", [r"odd"]),
    (r"\text{A and C}", [r"C and A"]),
    (r"x_1=1,x_2=2", [r"x_2 = 2, x_1 = 1"]),
    (r"\vec{v}_0", [r"\vec{v}_{0}"]),
    (r"\text{20 minutes}", [r"20", r"20 min"]),
    (r"5", [r"Area = 5"]),
    (r"7000", [r"7\ 000", '7\u2009000', '7\u202f000']),
    (r"75", [r"US$75", r"75 USD"]),
    (r"75000000", [r"$75 million"]),
    (r"42", [r"\mathbf{42}", r"\underline{42}", r"\textcolor{red}{42}", '42\\\\', r"#### 42", '6*7\n= 42',
        r"It is 42", r"**Final Answer:** 42", r"Final answer: $42$", r"\text{Final answer: }42", r"$x=42$",
        r"\(x = 42\)", r"The value of x is 42", r"The total number of people is 42.", r"She has 42 apples left.",
        r"n = 42."]),
    (r"2.5", [r"2\frac{1}{2}"]),
    (r"1234.5", [r"1,234.50"]),
    (r"1234567.89", [r"$1,234,567.89"]),
    (r"-5", [r"-$5", r"$-5"]),
    (r"5.5", [r"5 1/2 cups"]),
    (r"1.5", [r"1½ hours"]),
    (r"63_8", [r"63₈", r"63_{\mathrm{eight}}"]),
    (r"x=3", [r"3 = x"]),
    (r"3", [r"3=x"]),
    (r"C", [r"C)", r"(C)."]),
    (r"\frac{1}{2}x", [r"x/2"]),
    (r"10", [r"10 \text{ cm}", r"10 $\text{cm}^2$", r"$10$ cm$^2$", r"10 kg"]),
    (r"x^2", [r"x**2"]),
    (r"2x", [r"2*x", r"2 \cdot x"]),
    (r"\frac{a}{b}", [r"a/b"]),
    (r"\frac{a+b}{c}", [r"(a+b)/c"]),
    (r"a^{-1}", [r"1/a"]),
    (r"\sqrt{x}", [r"x^{1/2}", r"sqrt(x)"]),
    (r"\log_{10} x", [r"lg x"]),
    (r"e^{x}", [r"exp(x)"]),
    (r"\sin\theta", [r"sin θ", r"sin(θ)"]),
    (r"2\pi r", [r"2πr", r"2*pi*r"]),
    (r"\pi r^2", [r"πr²"]),
    (r"(2,3)", [r"(2;3)", r"( 2 , 3 )"]),
    (r"\{2\}", [r"{2}", r"2"]),
    (r"[2,3]", [r"[2; 3]"]),
    (r"3, 4", [r"3; 4"]),
    (r"3:4", [r"3 : 4"]),
    (r"x>2", [r"(2,\infty)", r"x > 2", r"2 < x"]),
    (r"\frac{7}{2}", [r"3.5"]),
    (r"3.5", [r"7/2"]),
    (r"0.125", [r"1/8"]),
    (r"10!", [r"3628800"]),
    (r"\binom{10}{3}", [r"120"]),
    (r"2^{10}", [r"1024"]),
    (r"1+i", [r"i+1"]),
    (r"\frac{1+i}{2}", [r"0.5+0.5i"]),
    (r"-i", [r"-1i"]),
    (r"\cot x", [r"1/tan(x)"]),
    (r"\sec x", [r"1/\cos x"]),
    (r"\tan x", [r"\sin x / \cos x"]),
    (r"\frac{\pi}{6}", [r"30°", r"π/6 rad", r"π/6 radians"]),
    (r"12\sqrt{35}", [r"12√35", r"12 sqrt(35)", r"12sqrt35"]),
    (r"5\sqrt{21}", [r"5 \times \sqrt{21}"]),
    (r"\sqrt[3]{5}", [r"5^(1/3)", r"∛5", r"cbrt(5)"]),
    (r"|x|", [r"abs(x)"]),
    (r"\lfloor x \rfloor", [r"floor(x)"]),
    (r"n \ge 3", [r"n >= 3"]),
    (r"0 < x \leq 3", [r"(0, 3]"]),
    (r"x \neq 0", [r"x != 0"]),
    (r"\text{True}", [r"true"]),
    (r"\text{yes}", [r"Yes."]),
    (r"7 \frac{3}{5}", [r"7 3/5", r"7.6", r"38/5"]),
    (r"1,2,3,4", [r"1, 2, 3, and 4", r"{1,2,3,4}", r"4,3,2,1"]),
    (r"(1,2),(3,4)", [r"(3,4), (1,2)", r"(1, 2) and (3, 4)"]),
    (r"2.0e5", [r"200000"]),
    (r"1.5e3", [r"1500"]),
    (r"2e5", [r"2 \times 10^5", r"200,000"]),
    (r"6.02 \times 10^{23}", [r"6.02e23", r"6.02*10^23", r"6.02 × 10²³"]),
    (r"-1.6e-19", [r"-1.6 \times 10^{-19} \text{ C}"]),
    (r"9.8", [r"9.8 m/s^2", r"9.8 \text{ m/s}^2", r"9.8\ \mathrm{m/s^2}"]),
    (r"1e33", [r"10^{33}", r"10^{33} erg/s"]),
    (r"\text{Tuesday}", [r"The answer is Tuesday", r"$\text{Tuesday}$"]),
    (r"p - q", [r"p-q", r"-q+p"]),
    (r"3R^2", [r"3 R²"]),
    (r"\frac{n^2}{4}", [r"n²/4"]),
    (r"2n-1", [r"2n − 1"]),
    (r"4\sqrt{3}-\pi", [r"-π+4√3"]),
]  # fmt: skip
WRONG = [
    (r"42", [r"42 or 43", r"43 42", r"42x", r"4.2", r"x > 42", r"about 43", r"-42", r"42i", r"42^2", r"{42, 43}",
        r"(42, 43)", r"[41,43]", r"\{42, 43\}", r"42 = 43", r"43 = 42", r"x = 41 = 42", r"not 42", r"at least 42",
        r"42 or more", r"42 more than n", r"42 minus 1", r"half of 42", r"42 dozen", r"42 thirds",
        r"42 hundredths", r"2(42)", r"42\ldots", r"42,43", r"42;43", r"42/43", r"\frac{42}{43}", r"42:43", r"42_7",
        r"42 base 7", r"42 in base 7", r"42 mod 43", r"42!", r"|42|+1", r"42 \pm 1", r"42 ± 0.5", r"42 \approx 43",
        r"42 & 43", r"42 / 43", r"42 或 43", r"42 oder 43", r"42 y 43", r"42 vs 43", r"**42** **43**", r"`42` `43`",
        r"$42$ $43$", r"\boxed{42}\boxed{43}", r"42 \text{ or } 43", r"x = 42 or x = 43", r"x=42, y=43",
        r"x \in \{42, 43\}", r"n \equiv 42 \pmod{43}", r"42.0001", r"41.9999999999", r"42 + 10^{-40}",
        r"42\cdot(1+10^{-70})", r"0x2A", r"4 2", r"42 1/2", r"1/42", r"42e1", r"42k", r"42 million", r"\sqrt{42}",
        r"42\%5", r"0.42", r"x=43, y=42", r"\log(x) = 42", r"wrong answer = 42", r"not = 42", r"2x = 42",
        r"x^2 = 42", r"the answer is not 42"]),
    (r"0.42", [r"42"]),
    (r"\frac12", [r"\frac{1}{3}"]),
    (r"1.5", [r"1,5", r"1.05"]),
    (r"1,5", [r"1.5"]),
    (r"100", [r"10^{10^{10}}", r"1,00"]),
    (r"0", [r"e^{-500}", r"10^{-300}"]),
    (r"\frac{1}{2006!}", [r"0"]),
    (r"10^{-30}", [r"0"]),
    (r"x+1", [r"x-1"]),
    (r"x", [r"y", r"-x", r"\hat{x}"]),
    (r"\sqrt{x^2}", [r"x"]),
    (r"|x|", [r"x"]),
    (r"x^2", [r"x^3"]),
    (r"2x", [r"x2"]),
    (r"[1,2]", [r"(1,2)"]),
    (r"(1,2)", [r"(2,1)", r"[1,2)"]),
    (r"1,2", [r"1,2,2"]),
    (r"1,1,2", [r"1,2"]),
    (r"1,2,3", [r"1,2"]),
    (r"\text{Monday}", [r"Tuesday"]),
    (r"\text{even}", [r"odd", r"even or odd", r"not even"]),
    (r"B", [r"A or B", r"(A)(B)", r"A, B", r"AB"]),
    (r"AB", [r"A"]),
    (r"\text{MAKE}", [r"KAME"]),
    (r"2:15 PM", [r"2:15 AM"]),
    (r"6:15", [r"6:51"]),
    (r"12:30", [r"6:15"]),
    (r"12:00", [r"1:00"]),
    (r"2:3", [r"3:2"]),
    (r"y=2x+3", [r"y=2x-3", r"2x+3=0"]),
    (r"x=5", [r"2x+3=13", r"y=5"]),
    (r"5", [r"2x+3=13", r"5 points down 3", r"5⁤6"]),
    (r"x>3", [r"x<3", r"x\ge 3", r"3"]),
    (r"a=2, b=3", [r"3, 2"]),
    (r"a=2,b=3", [r"a=3,b=2"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix}2\\1\end{pmatrix}"]),
    (r"\begin{pmatrix}1&2\end{pmatrix}", [r"\begin{pmatrix}1\\2\end{pmatrix}"]),
    (r"5\text{ cm}", [r"5\text{ m}", r"5 inches"]),
    (r"\$5", [r"5 cents"]),
    (r"90^\circ", [r"90 radians"]),
    (r"28\%", [r"28 dollars"]),
    (r"63_8", [r"63", r"51", r"63_{10}"]),
    (r"10_2", [r"10_3"]),
    (r"3.14", [r"\pi"]),
    (r"\pi", [r"3.14", r"22/7"]),
    (r"\sqrt{2}", [r"1.414"]),
    (r"\frac{1}{3}", [r"0.33"]),
    (r"\frac13", [r"0.333334"]),
    (r"2^{2005}", [r"2^{2005}+1", r"2^{2006}"]),
    (r"123456789", [r"123456788"]),
    (r"123456.7", [r"123456.8"]),
    (r"1000001", [r"1000000.9999999"]),
    (r"f(x)=ax+b", [r"f(x)=ax-b"]),
    (r"\frac{1}{\sqrt{3}}c", [r"\frac{1}{\sqrt{3}}"]),
    (r"\hbar\omega", [r"\omega"]),
    (r"2\hbar\omega", [r"2"]),
    (r"\sin x", [r"\sin y", r"\cos x"]),
    (r"\log_2 3", [r"\log_3 2"]),
    (r"e^x", [r"x^e"]),
    (r"i", [r"1"]),
    (r"(1,2)\cup(3,4)", [r"(1,2)", r"(1,4)"]),
    (r"7", [r"seven or eight", r"8 - 1 or 9"]),
    (r"n-1", [r"n+1"]),
    (r"1000", [r"1,0000"]),
    (r"9", [r"9 times 2", r"9 more", r"9 less than 10"]),
    (r"6", [r"5 < x < 7", r"six hundred"]),
    (r"60", [r"sixty-one"]),
    (r"f(x)=ax+b, where a,b \in R", [r"f(x)=ax+b"]),
    (r"3", [r"x^3", r"3 out of 4", r"3 in 4", r"3 of 4", r"three fourths", r"3 quarters", r"3 halves", r"3 over 4",
        r"minus 3", r"negative 3", r"3 below zero", r"3 hundred", r"3 hundredths", r"3 or so", r"3ish or 4",
        r"3?4", r"3 -- 4", r"3 – 4", r"3-4", r"3 to 4", r"3 through 5", r"from 3 to 5", r"between 3 and 5", r"< 3",
        r"<3", r">3", r"≥3", r"≠ 3", r"~4 or 3", r"≈ 3.1"]),
    (r"2", [r"2\text{ or }3", r"2 \text{ (mod 5)}", r"2 pi", r"2 e", r"2 i", r"\text{2 or 3}", r"2 cubed",
        r"2 squared", r"1st or 2nd", r"1st and 2nd place", r"x=1, y=2", r"2 alpha", r"2 exp"]),
    (r"14", [r"8 或 14", r"8 und 14"]),
    (r"120", [r"120 or 60"]),
    (r"10", [r"10 10", r"1010", r"10:10", r"10-10"]),
    (r"\text{odd}", [r"dod"]),
    (r"\frac{d^2 x}{d t^2}", [r"\frac{dx}{t^2}"]),
    (r"\hat{x}", [r"x"]),
    (r"\vec{F}", [r"F"]),
    (r"42", ["the wrong value is 42", "it is at least 42", "there are fewer than 42", "43\n42", "42\n43"]),
]  # fmt: skip


@pytest.mark.parametrize(("target", "answers"), RIGHT, ids=lambda v: v if isinstance(v, str) else "")
def test_right_answers(target, answers):
    """One value, several spellings: each earns the reward, and the target does as it is."""
    assert [a for a in [target, *answers] if not equal(target, a)] == []


@pytest.mark.parametrize(("target", "answers"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_answers(target, answers):
    """Another value, several candidates, a part of the target, another form that the question asks to get rid of."""
    assert [a for a in answers if equal(target, a)] == []


@pytest.mark.parametrize("name", ["math_answers", "math_reports"])
def test_cases_of_public_reports(data_folder, name):
    """Every case of the kinds that users of other verifiers reported."""
    lines = (data_folder.parent / "cases" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    score = get_task("math").score
    missed = []
    for case in cases:
        row = Row("m", "q", (), "", case["answer"], task="math")
        if score(case["completion"], row).right != bool(case["expected"]):
            missed.append(case)
    assert len(cases) > 30 and missed == []


def spelling_errors(targets):
    refused = [(t, a) for t in targets for a in right(t) if not equal(t, a)]
    return refused, [(t, a) for t in targets for a in wrong(t) if equal(t, a)]


@pytest.mark.parametrize("benchmark", sorted(TARGETS))
def test_natural_spellings(benchmark):
    refused, paid = spelling_errors(TARGETS[benchmark])
    assert refused == [] and paid == []


def test_natural_spellings_of_real_targets(data_folder):
    rows = read_rows(str(data_folder / "math" / "rows.parquet"))
    refused, paid = spelling_errors(sorted({str(row.answer["target"]) for row in rows})[::4])
    assert refused == [] and paid == []
    assert unreadable_targets(rows) == []
