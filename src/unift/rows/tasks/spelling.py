"""One spelling for what people and models write: Unicode signs, markdown, LaTeX spacing, thousands, currency, units.

Everything here is a rewriting of text by fixed tables. What a sign means is decided in `reading`.
"""

from __future__ import annotations

import re
import unicodedata

from unift.rows.tasks.signs import CONSTANTS, FUNCTIONS, GREEK

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∗": "*", "÷": "/",
    "∕": "/", "⁄": "/", "√": "\\sqrt ", "∛": "\\sqrt[3]", "∞": "\\infty ", "π": "\\pi ", "±": "\\pm ", "≤": "\\le ",
    "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ",
    "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "°": "^\\circ ", "…": "\\ldots ", "⋯": "\\ldots ", "、": ", ", "，": ", ",
    "；": "; ", "：": ":", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "⟨": "\\langle ",
    "⟩": "\\rangle ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "∨": " or ", "∧": " and ", "ħ": "\\hbar ",
    "€": "\\euro ", "£": "\\pound ", "¢": " cents ", "％": "%", "＄": "$", "\u200b": "", "\ufeff": "", "。": ".",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅖": " 2/5", "⅗": " 3/5", "⅘": " 4/5",
    "⅙": " 1/6", "⅚": " 5/6", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8", "⅞": " 7/8",
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi",
    "χ": "chi", "ψ": "psi", "ω": "omega", "Δ": "Delta", "Γ": "Gamma", "Θ": "Theta", "Λ": "Lambda", "Σ": "Sigma",
    "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_RAISED = {
    "⁰": "0",
    "¹": "1",
    "²": "2",
    "³": "3",
    "⁴": "4",
    "⁵": "5",
    "⁶": "6",
    "⁷": "7",
    "⁸": "8",
    "⁹": "9",
    "⁻": "-",
    "ⁿ": "n",
}
_LOWERED = {chr(0x2080 + n): str(n) for n in range(10)}
_TABLE = str.maketrans(_SIGNS | {sign: f"\\{name} " for sign, name in _GREEK.items()})

_WORDS = re.compile(r"\\(?:text|textrm|textbf|textit|textsf|texttt|textnormal|mbox|hbox|rm)\s*\{([^{}]*)\}")
_ROMAN = re.compile(r"\\(?:mathrm|operatorname|mathsf|mathtt|operatorname\*)\s*\{([^{}]*)\}")
_FONT = re.compile(
    r"\\(?:mathbf|mathit|underline|textcolor\{\w+\}|color\{\w+\}|mathcal|boldsymbol"
    r"|bm|mathfrak|displaystyle|textstyle|limits)(?![A-Za-z])"
)
_SPACES = re.compile(
    r"\\(?:quad|qquad|thinspace|medspace|enspace|hspace\{[^{}]*\}|phantom\{[^{}]*\})(?![A-Za-z])|\\[;:>\s]|~|\xa0"
)
_SIZES = re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg)(?![A-Za-z])\s*\.?")
_NAMES = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"), (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge "), (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\(?:lt|textless)(?![A-Za-z])"), "<"), (re.compile(r"\\(?:gt|textgreater)(?![A-Za-z])"), ">"),
    (re.compile(r"\\lor(?![A-Za-z])|\\vee(?![A-Za-z])"), " or "),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), " and "),
    (re.compile(r"\\(?:dots|cdots|dotsc|dotsb|hdots)(?![A-Za-z])"), r"\\ldots "), (re.compile(r"\.\.+"), r"\\ldots "),
    (re.compile(r"\\(?:degree|textdegree)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "), (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"), (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"), (re.compile(r"\\%|\bper\s?cent\b"), "%"),
    (re.compile(r"\\(?:dollar|textdollar)\b"), r"\\$"), (re.compile(r"\\mp(?![A-Za-z])"), r"\\pm "),
    (re.compile(r"\\#|\\&"), " "), (re.compile(r"\\nobreakspace"), " "),
)  # fmt: skip
ROW_END = "\x03"  # of a matrix, written \\\\ in LaTeX
_LETTER_UNITS = {
    "m": "meters", "g": "grams", "s": "seconds", "h": "hours", "L": "liters", "l": "liters", "N": "newtons",
    "J": "joules", "W": "watts", "V": "volts", "A": "amperes", "K": "kelvin", "C": "celsius", "F": "fahrenheit",
}  # fmt: skip


def spelled(text: str) -> str:
    """The same text in one spelling. Linear in its length; the caller caps that."""
    text = _raised(text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE))
    text = _unmarked(text)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z{},!;%$])", r"\\", text)  # escaped twice
    else:
        text = re.sub(r"\\\\(?:\[[^\]]*\])?", ROW_END, text)
    text = _ROMAN.sub(_roman, _WORDS.sub(_worded, text))
    if "\\begin" not in text:  # a line break between two terms, and not in the words of a unit
        text = re.sub(r"(?<=[\w})\]])\s*\n\s*(?=[\w\\({\[-])", " ;; ", text.strip())
    text = re.sub(r"\{\\(?:rm|bf|it)\s+([^{}]*)\}", r"{\1}", text)
    text = re.sub(r"(\d),?\\[,!](?:\\!)?\s*(?=\d{3}(?!\d))", r"\1", text)  # thousands: 7\,000  18,\!107  111, \! 111
    text = re.sub(r"(\d),\s*\\!\s*(?=\d{3}(?!\d))", r"\1", text)
    text = _SPACES.sub(" ", text).replace("\\!", "").replace("\\,", " ")
    text = _SIZES.sub("", _FONT.sub("", text))
    for pattern, new in _NAMES:
        text = pattern.sub(new, text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}", r"^\\circ ", text)
    text = re.sub(r"\\sqrt\s+(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    text = re.sub(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"(?<![\w\\}])(\w+)\s+choose\s+(\w+)(?!\w)", r"\\binom{\1}{\2}", text)
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r"\\times ", text)
    return text.strip()


def _raised(text: str) -> str:
    """x² as x^{2}, a₁ as a_{1}: before NFKC, which would write x2 and a1."""
    for table, sign in ((_RAISED, "^"), (_LOWERED, "_")):
        for run in sorted(set(re.findall(f"[{''.join(table)}]+", text)), key=len, reverse=True):
            text = text.replace(run, f"{sign}{{{''.join(table[char] for char in run)}}}")
    return text


def _unmarked(text: str) -> str:
    """Without markdown: bold, italics and backticks around a word or a formula, a heading sign, a bullet. "> 5" stays what it
    says."""
    text = re.sub(r"^\s*(?:#{1,6}\s+|[-*]\s+(?=[A-Za-z]))", "", text)
    for _ in range(2):
        text = re.sub(r"```(?:\w+\n)?([^`]*)```|`([^`]*)`", lambda m: m[1] or m[2] or "", text)
        text = re.sub(r"(?<![\w)}\]*])\*\*(?=[^\s*])([^*]*[^\s*])\*\*(?![\w({\[*])", r"\1", text)
        text = re.sub(r"(?<![\w)}\]*])\*(?=[^\s*])([^*]*[^\s*])\*(?![\w({\[*])", r"\1", text)
        text = re.sub(r"(?<![\w)}\]])__(?=[^\s_])([^_]*[^\s_])__(?!\w)", r"\1", text)
    return text


def _worded(match: re.Match[str]) -> str:
    """The words of a \\text{...}; one letter after a number is a unit."""
    inner = " ".join(match[1].replace("~", " ").split())
    return f" {_as_unit(match, inner)} "


def _roman(match: re.Match[str]) -> str:
    inner = " ".join(match[1].replace("~", " ").split())
    return inner if inner in ("e", "i", "d") else f" {_as_unit(match, inner)} "


def _as_unit(match: re.Match[str], inner: str) -> str:
    before = match.string[: match.start()].rstrip().rstrip("~\\, ")
    return _LETTER_UNITS.get(inner, inner) if before[-1:].isdecimal() or before[-1:] in ("}", ")") else inner


# ---------------------------------------------------------------------------------------------- units

_UNITS = {
    "$": "dollar dollars usd buck bucks", "€": "euro euros eur", "£": "pounds sterling gbp", "cent": "cent cents",
    "%": "% percent", "deg": "degree degrees deg", "rad": "radian radians rad",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres", "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres", "in": "in inch inches", "ft": "ft foot feet",
    "yd": "yd yard yards", "mi": "mi mile miles", "unit": "unit units", "g": "g gram grams",
    "kg": "kg kilogram kilograms kilos", "mg": "mg milligram milligrams", "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces", "ton": "ton tons tonne tonnes", "s": "s sec secs second seconds",
    "ms": "ms millisecond milliseconds", "min": "min mins minute minutes", "h": "h hr hrs hour hours",
    "day": "day days", "week": "week weeks", "month": "month months", "year": "year years yr yrs",
    "L": "l L liter liters litre litres", "mL": "ml mL milliliter milliliters millilitre millilitres",
    "gal": "gal gallon gallons", "N": "N newton newtons", "J": "J joule joules", "kJ": "kJ kilojoule kilojoules",
    "W": "W watt watts", "kW": "kW kilowatt kilowatts", "V": "V volt volts", "A": "A ampere amperes amp amps",
    "K": "K kelvin kelvins", "C": "C celsius", "F": "F fahrenheit", "Hz": "Hz hertz",
    "eV": "eV electronvolt electronvolts", "Pa": "Pa pascal pascals", "mol": "mol mole moles", "erg": "erg ergs",
    "pc": "pc parsec parsecs", "AU": "AU", "nm": "nm nanometer nanometers",
    "Å": "angstrom angstroms Angstrom Angstroms", "mi/h": "mph", "km/h": "kph kmh",
}  # fmt: skip
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in words.split()}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# words after a number that change or question it, so that it is not the answer that the number alone would be
CHANGING = set(
    "or and but not nor either neither no minus plus times divided multiplied over under more less fewer than greater at "
    "least most about approximately approx roughly almost nearly around between to by mod modulo base remainder squared "
    "cubed root factorial half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh "
    "sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths point negative "
    "positive power exponent if when unless except maybe perhaps possibly wrong incorrect false instead through until "
    "up down off without with plusminus versus vs zero one two three four five six seven eight nine ten eleven twelve "
    "twenty thirty forty fifty sixty seventy eighty ninety double triple twice thrice where for as because since is are "
    "equals equal would could should might may can cannot isn't aren't".split()
)
MAX_WORDS = 6
_MATHEMATICS = FUNCTIONS | GREEK | set(CONSTANTS)


def unit_of(words: str) -> str | None:
    """The unit that some words name in one spelling, "" if they are other plain words (a noun), None if neither.

    "square inches", "in^2" and "sq in" are one unit; words that change a number (`CHANGING`) are none.
    """
    words = " ".join(words.split()).strip(" .,;!")
    if words.startswith("(") and words.endswith(")"):
        words = words[1:-1].strip()
    if not words:
        return ""
    found = _compound(words)
    if found is not None:
        return found
    written = words.lower().replace("'", "").replace("-", " ").split()
    if not 0 < len(written) <= MAX_WORDS or not all(
        re.fullmatch(r"[a-z]+", word) and len(word) > 1 or word == "a" for word in written
    ):
        return None
    if (
        any(word in CHANGING or word in SCALES or word in _MATHEMATICS for word in written)
        or len(written[0]) < 3
        and written[0] not in ("of", "in")
    ):
        return None
    if not any(re.search("[aeiou]" if len(word) < 4 else "[aeiouy]", word) for word in written):
        return None
    first = _compound(written[0])
    return first if first is not None else ""


def _compound(words: str) -> str | None:
    """Units with powers and quotients, or None: m/s^2, "miles per hour", "cubic feet", erg s^{-1}."""
    text = re.sub(r"\b(?:per|a|an|each)\b(?=\s)", "/", words)
    text = (
        re.sub(r"\s*\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", text)
        .replace("\\cdot", " ")
        .replace("*", " ")
        .replace("\\times", " ")
    )
    text = re.sub(r"\b([A-Za-z]+)\s+(squared|cubed)\b", lambda m: f"{m[1]}^{2 if m[2] == 'squared' else 3}", text)
    text = re.sub(r"\b(square|sq\.?|cubic|cu\.?)\s+([A-Za-z]+)", lambda m: f"{m[2]}^{2 if m[1][0] == 's' else 3}", text)
    powers: dict[str, int] = {}
    for k, part in enumerate(text.split("/")):
        for word in part.split():
            match = re.fullmatch(r"([A-Za-z]+|%)(?:\^(-?\d))?", word)
            unit = (
                _UNIT_OF.get(match[1]) or _UNIT_OF.get(match[1].lower() if len(match[1]) > 2 else "") if match else None
            )
            if match is None or unit is None:
                return None
            powers[unit] = powers.get(unit, 0) + int(match[2] or 1) * (-1 if k else 1)
        if not part.split():
            return None
    return " ".join(sorted(f"{unit}^{power}" for unit, power in powers.items() if power)) or None
