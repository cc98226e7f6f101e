"""Natural spellings of final answers, right and wrong, for real and hand-written targets.

`right(target)` writes the same answer otherwise, `wrong(target)` writes others that look like it. Both work on the text
alone, by rules of their own: they share nothing with the reader that they test.
"""

from __future__ import annotations

import re
from fractions import Fraction

# answers of the kinds that each benchmark asks for, written for this list
TARGETS = {
    "GSM8K": ["18", "3", "70000", "540", "20", "2.50", "1,450", "57500", "366", "0.75", "109", "8"],
    "AIME": ["204", "113", "073", "25", "809", "104", "321", "45"],
    "AMC": ["142.0", "27.0", "\\frac{2}{5}", "13", "-1.5", "36.0", "4000"],
    "Minerva": [
        "4.5e33", "2.75e11", "1.70e4", "6.1 \\times 10^{-9}", "0.5", "\\arcsin{1.3 \\sin{\\theta_w}}", "-2.19e6", "8.7e8",
        "I_{0} e^{-\\frac{t}{\\tau}}", "\\frac{1}{2} m v^{2}", "x_{0} \\cos (\\omega t)", "\\frac{G M m}{r^2}", "7.5e-7",
        "\\frac{2 \\pi c}{\\lambda}", "\\frac{\\hbar^2}{2 m}", "4.03e-10", "16.0",
    ],
    "Olympiad": [
        "$2^{1009}$", "$\\frac{1}{2 n+2}$", "$(6,5)$", "$[1,3)$", "$0<k<1$", "$\\{1,4,9\\}$", "$n-1$", "$\\binom{n}{2}$",
        "$19 \\frac{1}{2}$", "$45^{\\circ}$", "$\\log _{2} 3$", "$f(x)=2 x+1$", "$\\frac{\\sqrt[3]{5}}{2}$", "$3, 5, 7$",
        "$x=3$", "$4 \\sqrt{3}-\\pi$", "$1006^{2}$", "$(1,5) \\cup (5,20)$", "$x \\le 4$", "$2:3$", "$34 x+45 y-20=0$",
        "$63_{8}$", "$\\frac{1}{2004!}$", "$1-\\frac{1}{e}$", "$y=2 x+3$", "$3+2 i$", "$(-\\infty, 2]$", "$\\frac{n(n+1)}{2}$",
    ],
}  # fmt: skip
NOUNS = ("people", "apples", "clips", "pages left", "dollars", "hours", "miles per hour", "students in the class")
_INTEGER = re.compile(r"-?\d+")
_SIMPLE = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def right(target: str) -> list[str]:
    """The same answer in other spellings."""
    core = _core(target)
    found = [core, f"${core}$", f"$ {core} $", f"\\boxed{{{core}}}", f"$\\boxed{{{core}}}$", f"**{core}**", f"**${core}$**", f"\\({core}\\)",
             f"\\[{core}\\]", f"`{core}`", f"{core}.", f"${core}$.", f"The answer is {core}", f"The final answer is ${core}$.",
             f"Answer: {core}", f"= {core}"]  # fmt: skip
    found += _numbers(core) + _formulas(core) + _groups(core)
    return list(dict.fromkeys(found))


def wrong(target: str) -> list[str]:
    """Other answers that resemble this one, and this one among others."""
    core = _core(target)
    found = [f"{core} or 7777", f"{core}, 7777", f"7777 or {core}", f"7777\n{core}", f"{core} | 7777", f"\\boxed{{{core}}} or \\boxed{{7777}}",
             f"${core}$ and $7777$", f"not {core}", f"7777 \\lor {core}", f"{core} \\ldots", f"1, 2, \\ldots, {core}"]  # fmt: skip
    if "text" in core or re.fullmatch(r"[A-Z]", core):
        return [*found, "7777", "\\text{Other}"]
    digits = list(re.finditer(r"\d", core))
    for match in digits[:1] + digits[-1:]:  # another first or last digit; an exponent changes much, a decimal little
        other = str((int(match.group()) + 1) % 10)
        changed = core[: match.start()] + other + core[match.end() :]
        found += [changed, f"${changed}$"]
    if core != "0" and (_INTEGER.fullmatch(core) or _SIMPLE.fullmatch(core)):  # 0x is 0
        found += [
            f"{core}x",
            f"{core}\\sqrt{{2}}",
            f"{core}\\sqrt(2)",
            f"{core} \\pm 1",
            f"x > {core}",
            f"{core} + 10^{{-9}}",
            f"{core}!!",
        ]
        found += [
            f"{core}^2 + 1",
            f"\\frac{{{core}}}{{2}} + \\pi",
            f"{core}_7",
            f"{core} minus two",
            f"{core} \\approx 7777",
        ]
    if core != "0" and _INTEGER.fullmatch(core):
        found += [
            f"{core} 1/2",
            f"{core} 2/3",
            f"{core},000",
            f"{core}.1",
            f"{core} million",
            f"7777 {core}/7777",
            f"7777 = {core}",
        ]
        found += [f"{core}e3", f"{core}:7777"]
    if "+" in core:
        found += [core.replace("+", "-", 1), core.split("+")[0]]
    elif " - " in core:
        found += [core.replace(" - ", " + ", 1), core.split(" - ")[0]]
    if match := re.fullmatch(r"(\\left)?([(\[])(.*?),(.*)(\\right)?([)\]])", core):
        if match[3].strip() != match[4].strip() and "," not in match[4] and "cup" not in core:
            found += [core.replace("(", "[", 1) if "(" in core else core.replace("[", "(", 1)]
    return [text for text in dict.fromkeys(found) if _value(text) is None or _value(text) != _value(core)]


def _core(target: str) -> str:
    return target.strip().strip("$").strip()


def _value(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _numbers(core: str) -> list[str]:
    found = []
    value = _value(core)
    bare = core.replace(",", "").lstrip("0") or "0"
    if value is not None and _INTEGER.fullmatch(core.replace(",", "")):
        found += [
            f"{bare}.0",
            f"{bare}.00",
            f"${bare}",
            f"\\${bare}",
            f"${bare}.00",
            f"+{bare}",
            f"x = {bare}",
            f"{{{bare}}}",
        ]
        found += [f"{bare} {noun}" for noun in NOUNS] + [
            f"${bare}$ {NOUNS[0]}",
            f"\\boxed{{{bare}}} {NOUNS[1]}",
            f"{bare}\\text{{ {NOUNS[2]}}}",
        ]
        found += [
            f"{bare}\\%",
            f"{bare} percent",
            f"{bare}^\\circ",
            f"{bare}\\text{{ cm}}",
            f"{bare} \\mathrm{{~m}}",
            f"{bare}\\ \\text{{cm}}^2",
        ]
        found += [bare.replace("-", "−"), bare.translate({ord("0") + n: ord("０") + n for n in range(10)})]
        if abs(value) >= 1000:
            comma = f"{int(value):,}"
            found += [comma, comma.replace(",", "{,}"), comma.replace(",", "\\,"), comma.replace(",", ",\\!"), comma.replace(",", " "), f"${comma}",
                      f"{comma} dollars"]  # fmt: skip
            zeros = len(bare) - len(bare.rstrip("0"))
            if zeros >= 3:
                found += [
                    f"{bare[:-zeros]}e{zeros}",
                    f"{bare[:-zeros]} \\times 10^{{{zeros}}}",
                    f"{bare[:-zeros]} × 10^{zeros}",
                    f"{bare[:-zeros]}*10^{zeros}",
                ]
    if match := re.fullmatch(r"(-?[\d.]+)(?:e| \\times 10\^\{)(-?\d+)\}?", core):
        for form in (
            "{}e{}",
            "{}E{}",
            "{} \\times 10^{{{}}}",
            "{} × 10^{}",
            "{}*10^{}",
            "{} x 10^{}",
            "{} \\cdot 10^{{{}}}",
            "{}*10**{}",
            "${} \\times 10^{{{}}}$",
        ):
            found.append(form.format(match[1], match[2]))
    if value is not None and "." in core and "e" not in core:
        found += [
            core.rstrip("0").rstrip("."),
            f"{core}0",
            f"${core}",
            f"{value}",
            f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
        ]
    return found


def _formulas(core: str) -> list[str]:
    found = []
    if match := _SIMPLE.fullmatch(core):
        sign, a, b = match[1], int(match[2]), int(match[3])
        found += [f"{sign}{a}/{b}", f"{sign}\\dfrac{{{a}}}{{{b}}}", f"{sign}\\tfrac{{{a}}}{{{b}}}", f"{sign}\\frac{{{2 * a}}}{{{2 * b}}}",
                  f"\\frac{{{sign}{a}}}{{{b}}}", f"${sign}{a}/{b}$", f"x = {sign}\\frac{{{a}}}{{{b}}}", f"{sign}{a / b:.16g}"]  # fmt: skip
        if a < 10 and b < 10:
            found.append(f"{sign}\\frac{a}{b}")
        if a > b and a % b:
            found += [
                f"{sign}{a // b} {a % b}/{b}",
                f"{sign}{a // b}\\frac{{{a % b}}}{{{b}}}",
                f"{sign}{a // b} \\frac{{{a % b}}}{{{b}}}",
            ]
    if match := re.fullmatch(r"(\d*) ?\\sqrt\{?(\d+)\}?", core):
        found += [f"{match[1]}√{match[2]}", f"{match[1]}\\sqrt{{{match[2]}}}", f"{match[1]}sqrt({match[2]})", f"{match[1] or 1}*sqrt({match[2]})",
                  f"{match[1] or 1} \\cdot \\sqrt{{{match[2]}}}", f"\\sqrt{{{int(match[1] or 1) ** 2 * int(match[2])}}}"]  # fmt: skip
    if match := re.fullmatch(r"\\frac\{(\d*)\s*\\sqrt\{(\d+)\}\}\{(\d+)\}", core):
        found += [f"{match[1]}√{match[2]}/{match[3]}", f"({match[1]}sqrt({match[2]}))/{match[3]}", f"\\frac{{{match[1]}}}{{{match[3]}}}\\sqrt{{{match[2]}}}"
                  if match[1] else f"\\frac{{1}}{{{match[3]}}}\\sqrt{{{match[2]}}}"]  # fmt: skip
    if "\\pi" in core and "\\frac" not in core:
        found += [
            core.replace("\\pi", "π"),
            re.sub(r"(\d) ?\\pi", r"\1pi", core),
            re.sub(r"(\d) ?\\pi", r"\1*pi", core),
        ]
    if match := re.fullmatch(r"(-?\d+)\^\{?\\circ\}?", core):
        found += [match[1], f"{match[1]}°", f"{match[1]} degrees", f"{match[1]}^{{\\circ}}", f"{match[1]}^\\circ"]
    if match := re.fullmatch(r"(-?[\d.]+)\\%", core):
        found += [match[1], f"{match[1]}%", f"{match[1]} percent", str(float(Fraction(match[1]) / 100))]
    if match := re.fullmatch(r"\\\$(-?[\d.,]+)", core):
        found += [match[1], f"${match[1]}", f"{match[1]} dollars", f"\\${match[1]}", f"{match[1]}$"]
    if match := re.fullmatch(r"(-?[\d.\\pi]+) ?\\text\{\s*(.*?)\}", core.replace("\n", " ")):
        found += [
            match[1],
            f"{match[1]} {match[2]}",
            f"{match[1]}\\ \\text{{{match[2]}}}",
            f"{match[1]} \\mathrm{{{match[2]}}}",
        ]
    if match := re.fullmatch(r"\\text\{(.*)\}", core):
        found += [
            match[1],
            f"\\textbf{{{match[1]}}}",
            f"**{match[1]}**",
            f"{match[1]}.",
            f"\\text{{{match[1]} }}",
            f"\\mathrm{{{match[1]}}}",
        ]
    if (
        re.fullmatch(r"[-+*a-z0-9\\ {}^().]*[a-z][-+*a-z0-9\\ {}^().]*", core)
        and core.count("+") == 1
        and not re.search(r"[(_=]|frac", core)
    ):
        left, right_side = core.split("+")
        found += [f"{right_side.strip()} + {left.strip()}", core.replace(" ", "")]
    if match := re.fullmatch(r"(\d+)_\{?(\d+)\}?", core):
        found += [
            f"{match[1]}_{match[2]}",
            f"{match[1]}_{{{match[2]}}}",
            f"{match[1]}_{{\\text{{{match[2]}}}}}",
            f"{match[1]} (base {match[2]})",
        ]
    if match := re.fullmatch(r"([a-z](?:\(x\))?) ?= ?(.*)", core):
        found += [match[2], f"{match[1]}={match[2]}", f"${match[1]} = {match[2]}$"]
    if match := re.fullmatch(r"(\d+)\^\{(\d+)\}", core):
        found += [
            f"{match[1]}^{match[2]}" if len(match[2]) == 1 else f"{match[1]}^{{{match[2]}}}",
            f"{match[1]}**{match[2]}",
        ]
    if match := re.fullmatch(r"(\d+):(\d+)", core):
        found += [f"{match[1]} : {match[2]}", f"{2 * int(match[1])}:{2 * int(match[2])}"]
    if "e" not in core and "text" not in core and re.search(r"\d", core) and "-" in core:
        found.append(core.replace("-", "−"))
    return found


def _groups(core: str) -> list[str]:
    found = []
    if "pmatrix" in core:
        found += [
            core.replace("pmatrix", "bmatrix"),
            core.replace(" ", ""),
            re.sub(r"(-?)(\d+)/(\d+)", r"\1\\frac{\2}{\3}", core),
        ]
    elif match := re.fullmatch(r"(?:\\left)?\s*\((.*?)(?:\\right)?\)", core):
        inner = match[1].strip()
        if "cup" not in core and re.search(r",", inner):
            tight = re.sub(r"\s*,\s*", ",", inner)
            found += [
                f"({tight})",
                f"({tight.replace(',', ', ')})",
                f"\\left({inner}\\right)",
                f"$({inner})$",
                f"\\left( {tight} \\right)",
            ]
            found.append("(" + re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", tight) + ")")
    elif (
        re.fullmatch(r"[^()\[\]]*,[^()\[\]]*", core)
        and "\\!" not in core
        and _value(core) is None
        and "text{C" not in core
    ):
        parts = [
            part.strip()
            for part in re.split(r",|\\text\{ ?and ?\}", core.removeprefix("\\{").removesuffix("\\}"))
            if part.strip()
        ]
        if core.startswith("\\{"):
            found += ["\\{" + ", ".join(reversed(parts)) + "\\}", "{" + ", ".join(parts) + "}"]
        else:
            found += [
                ", ".join(reversed(parts)),
                ",".join(parts),
                " and ".join(parts),
                ", ".join(parts[:-1]) + ", and " + parts[-1],
            ]
            found += ["$" + "$, $".join(parts) + "$", " \\text{ and } ".join(parts)]
    if "\\infty" in core:
        found += [core.replace("\\infty", "∞"), core.replace("\\infty", "infinity")]
    if "\\cup" in core:
        found += [
            core.replace("\\cup", "U"),
            core.replace("\\cup", "∪"),
            " \\cup ".join(reversed([p.strip() for p in core.split("\\cup")])),
        ]
    return found
