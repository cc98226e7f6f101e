"""The value of a formula's tree: an exact fraction where it has one, else a number of 100 digits. Work is bounded.

Two trees are equal when their values are: exactly for fractions, to a relative error of 1e-60 otherwise. Trees with
variables are compared at fixed points, at which polynomials and quotients of polynomials have exact values, so
different ones agree only with a chance below 1e-9 (Schwartz and Zippel) that no text can steer without knowing them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, cast

from mpmath import MPContext  # pyright: ignore[reportMissingTypeStubs]

from unift.rows.tasks.formula import FormulaError, Tree, functions, symbols

DIGITS, AGREE = 100, 60  # digits of a number, and how many of them must agree
POINTS = 4  # all variables are negative at the last but one, some at the last
MAX_BITS = 24_000  # of an exact numerator or denominator: 2006! fits
MAX_WORK = 4_000  # units per comparison; one is about 10 microseconds
MAX_FACTORIAL = 2_500
LOG_BASES = (None, 10)  # what \\log without a base may mean: natural, decimal

Value = Any  # Fraction, or a number of the mpmath context (real or complex)
_MP = cast(Any, MPContext())  # mpmath comes without types
_MP.dps = DIGITS


class Work:
    """Counts down; FormulaError when a formula costs more than it may."""

    def __init__(self, left: int = MAX_WORK) -> None:
        self.left = left

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise FormulaError("takes too long to evaluate")


def evaluate(tree: Tree, point: int = 0, log_base: int | None = None, work: Work | None = None) -> Value:
    """The value of a tree, its variables set to those of this point. FormulaError where it has none."""
    try:
        return _Evaluation(point, log_base, work or Work()).value(tree)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError, ArithmeticError, AttributeError) as error:
        if isinstance(error, FormulaError):
            raise
        raise FormulaError(f"has no value ({type(error).__name__})") from None


def equal_trees(one: Tree, other: Tree) -> bool:
    """Whether two formulas have the same value, whatever their variables are. False where they cannot be evaluated."""
    if one == other:
        return True
    names = symbols(one) | symbols(other)
    work = Work()
    bases = LOG_BASES if "log" in functions(one) | functions(other) else (None,)
    return any(_agree(one, other, POINTS if names else 1, base, work) for base in bases)


def _agree(one: Tree, other: Tree, points: int, base: int | None, work: Work) -> bool:
    met = 0
    for point in range(points):
        try:
            left, right = evaluate(one, point, base, work), evaluate(other, point, base, work)
        except FormulaError:
            if work.left < 0 or points == 1:
                return False
            continue
        if _only_one_is_zero(left, right):
            same = _vanishes(other if isinstance(left, Fraction) else one, point, base, work)
        else:
            same = equal_values(left, right)
        if not same:
            return False
        met += 1
    return met > 0 and met >= points - 2


def proportional(one: Tree, other: Tree, positive: bool = False) -> bool:
    """Whether one formula is a constant (not 0) times the other; ``positive``: a constant above 0."""
    ratio: Value = None
    work, met = Work(), 0
    for point in range(POINTS):
        try:
            left, right = evaluate(one, point, None, work), evaluate(other, point, None, work)
            if left == 0 or right == 0:
                return False
            found = _divide(left, right)
        except (FormulaError, ZeroDivisionError):
            continue
        if ratio is not None and not equal_values(ratio, found):
            return False
        ratio, met = found, met + 1
    if ratio is None or met < 2:
        return False
    return not positive or (not isinstance(ratio, _MP.mpc) and ratio > 0)


def equal_values(one: Value, other: Value) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    a, b = _number(one), _number(other)
    if _MP.isinf(a) or _MP.isinf(b):
        return a == b
    return abs(a - b) <= max(abs(a), abs(b)) * _MP.mpf(10) ** -AGREE


def _only_one_is_zero(one: Value, other: Value) -> bool:
    """Whether one value is exactly 0 and the other is a number that rounding may have kept from it."""
    return (isinstance(one, Fraction) and one == 0) != (isinstance(other, Fraction) and other == 0) and not (
        isinstance(one, Fraction) and isinstance(other, Fraction)
    )


def _vanishes(tree: Tree, point: int, base: int | None, work: Work) -> bool:
    """Whether a value is 0: then it shrinks with the precision, however small it already is."""
    coarse = abs(_number(evaluate(tree, point, base, work)))
    with _MP.workdps(2 * DIGITS):
        fine = abs(_number(evaluate(tree, point, base, work)))
        return bool(fine <= coarse * _MP.mpf(10) ** -AGREE)


def rounds_to(value: Value, decimal: Fraction, places: int) -> bool:
    """Whether a decimal with so many places is this value, rounded or cut off, and the value needs more of them."""
    if isinstance(value, _MP.mpc) or places < 0:
        return False
    unit = Fraction(1, 10**places)
    if isinstance(value, Fraction) and (value / unit).denominator == 1:
        return False
    if not isinstance(value, Fraction):
        decimal, unit = _number(decimal), _number(unit)
        value, decimal = (-value, -decimal) if value < 0 else (value, decimal)
    elif value < 0:
        value, decimal = -value, -decimal
    return bool(abs(value - decimal) <= unit / 2 or 0 <= value - decimal < unit)


def _number(value: Value) -> Any:
    return _MP.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _divide(one: Value, other: Value) -> Value:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one / other
    return _number(one) / _number(other)


def _setting(name: str, point: int) -> Fraction:
    """What a variable is at a point: between 0.2 and 5, negative at the last but one point, of either sign at the last."""
    digest = hashlib.blake2b(f"{name}|{point}".encode(), digest_size=8).digest()
    above, below = 20 + int.from_bytes(digest[:3], "little") % 480_007 / 1000, 101 + digest[3] % 7
    value = Fraction(int(above * 1000), below * 1000)
    return -value if point == POINTS - 2 or (point == POINTS - 1 and digest[4] % 2) else value


class _Evaluation:
    def __init__(self, point: int, log_base: int | None, work: Work) -> None:
        self.point, self.log_base, self.work = point, log_base, work

    def value(self, tree: Tree) -> Value:
        kind = tree[0]
        self.work.spend(1)
        if kind == "num":
            return tree[1]
        if kind == "sym":
            return _setting(tree[1], self.point)
        if kind == "const":
            return {"pi": +_MP.pi, "e": +_MP.e, "i": _MP.mpc(0, 1), "oo": _MP.inf}[tree[1]]
        parts = [self.value(part) for part in (tree[2:] if kind in ("fn", "apply") else tree[1:])]
        if kind == "neg":
            return -parts[0]
        if any(not isinstance(p, Fraction) and not _MP.isfinite(p) for p in parts):
            raise FormulaError("infinity in a formula")
        return self.kept(self.combine(tree, kind, parts))

    def combine(self, tree: Tree, kind: str, parts: list[Value]) -> Value:
        exact = all(isinstance(p, Fraction) for p in parts)
        if kind in ("add", "mul", "div"):
            if not exact:
                parts = [_number(p) for p in parts]
                self.work.spend(1)
            a, b = parts
            return a + b if kind == "add" else a * b if kind == "mul" else a / b
        if kind == "pow":
            return self.raised(parts[0], parts[1])
        if kind == "fact":
            return self.factorial(parts[0])
        if kind == "degree":
            return _number(parts[0]) * _MP.pi / 180
        if kind == "apply":
            shift = _number(_setting(tree[1], self.point))
            return sum((_MP.sin(_number(p) * (k + shift)) for k, p in enumerate(parts, 1)), shift)
        self.work.spend(5)
        return _CALLS[tree[1]](self, *parts)

    def kept(self, value: Value) -> Value:
        """The result of an operation, if it is small enough to go on with."""
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if bits > MAX_BITS:
                raise FormulaError("a number with too many digits")
            self.work.spend(bits // 500)
            return value
        if not _MP.isfinite(value):
            raise FormulaError("has no finite value")
        if value != 0 and not -(10**9) < _MP.mag(value) < 10**9:
            raise FormulaError("too large or too small a number")
        return value.real if isinstance(value, _MP.mpc) and value.imag == 0 else value

    def raised(self, base: Value, power: Value) -> Value:
        if base == 0 and (isinstance(power, _MP.mpc) or power <= 0):
            raise FormulaError("a power of zero")
        if isinstance(base, Fraction) and isinstance(power, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length(), 1)
            if power.denominator == 1 and abs(power) * bits <= MAX_BITS:
                return base ** int(power)
            if power.denominator != 1 and base > 0 and (root := _exact_root(base, power.denominator)) is not None:
                return self.raised(root, Fraction(power.numerator))
            if power.denominator == 1 and base == 1:
                return base
        a, b = _number(base), _number(power)
        if a != 0 and abs(b) * abs(_MP.mag(a)) > 10**8:
            raise FormulaError("too large a power")
        self.work.spend(5)
        if isinstance(power, Fraction) and power.denominator == 1:
            return a ** int(power)
        return _MP.power(a, b)

    def factorial(self, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
            if value > MAX_FACTORIAL:
                raise FormulaError(f"a factorial above {MAX_FACTORIAL}!")
            self.work.spend(int(value) // 20)
            return Fraction(math.factorial(int(value)))
        return self.gamma(_number(value) + 1)

    def gamma(self, value: Value) -> Value:
        if abs(value) > 1_000:
            raise FormulaError("too large a factorial")
        self.work.spend(200)
        return _MP.gamma(value)


def _exact_root(value: Fraction, index: int) -> Fraction | None:
    """The root of a fraction above 0, if that is a fraction."""
    if index > 64:
        return None
    parts: list[int] = []
    for n in (value.numerator, value.denominator):
        root = _whole_root(n, index)
        if root is None:
            return None
        parts.append(root)
    return Fraction(parts[0], parts[1])


def _whole_root(n: int, index: int) -> int | None:
    low, high = 0, 1 << -(-n.bit_length() // index)
    if index == 2:
        root = math.isqrt(n)
        return root if root * root == n else None
    if n.bit_length() > 4_000:
        return None
    while low < high:
        middle = (low + high) // 2
        if middle**index < n:
            low = middle + 1
        else:
            high = middle
    return low if low**index == n else None


def _root(run: _Evaluation, value: Value, index: Value) -> Value:
    """Real for a real value where there is a real root."""
    if not isinstance(index, Fraction) or index == 0:
        return run.raised(value, 1 / _number(index))
    odd = index.denominator == 1 and index.numerator % 2 == 1
    negative = not isinstance(value, _MP.mpc) and value < 0
    return -run.raised(-value, 1 / index) if negative and odd else run.raised(value, 1 / index) if value != 0 else value


def _real_call(function: Callable[[Value], Value], limit: float) -> Callable[..., Value]:
    """A function of mpmath, for arguments up to a size at which it still costs little."""

    def call(run: _Evaluation, value: Value) -> Value:
        number = _number(value)
        if abs(number) > limit:
            raise FormulaError("too large an argument")
        return function(number)

    return call


def _absolute(run: _Evaluation, value: Value) -> Value:
    return abs(value)


def _natural(run: _Evaluation, value: Value) -> Value:
    return _MP.log(_number(value))


def _decimal(run: _Evaluation, value: Value) -> Value:
    return _MP.log(_number(value)) / _MP.log(10)


def _logarithm(run: _Evaluation, value: Value, *base: Value) -> Value:
    under = base[0] if base else run.log_base
    result = _MP.log(_number(value))
    return result if under is None else result / _MP.log(_number(Fraction(under) if isinstance(under, int) else under))


def _floor(run: _Evaluation, value: Value) -> Value:
    if isinstance(value, Fraction):
        return Fraction(math.floor(value))
    if isinstance(value, _MP.mpc) or abs(value) > 10**30:
        raise FormulaError("no floor")
    return Fraction(int(_MP.floor(value)))


def _ceiling(run: _Evaluation, value: Value) -> Value:
    return -_floor(run, -value)


def _whole(values: Sequence[Value]) -> list[int]:
    if any(not isinstance(v, Fraction) or v.denominator != 1 for v in values):
        raise FormulaError("expected whole numbers")
    return [int(v) for v in values]


def _divisor(run: _Evaluation, *values: Value) -> Value:
    return Fraction(math.gcd(*_whole(values)))


def _multiple(run: _Evaluation, *values: Value) -> Value:
    return Fraction(math.lcm(*_whole(values)))


def _largest(run: _Evaluation, *values: Value) -> Value:
    return max(values, key=_number)


def _smallest(run: _Evaluation, *values: Value) -> Value:
    return min(values, key=_number)


def _binomial(run: _Evaluation, n: Value, k: Value) -> Value:
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and 0 <= k <= n:
        if n > MAX_FACTORIAL:
            raise FormulaError("too large a binomial")
        return Fraction(math.comb(int(n), int(k)))
    a, b = _number(n), _number(k)
    return run.gamma(a + 1) / (run.gamma(b + 1) * run.gamma(a - b + 1))


_SMALL = 1e30
_CALLS: dict[str, Callable[..., Value]] = {
    "root": _root,
    "abs": _absolute,
    "floor": _floor,
    "ceil": _ceiling,
    "gcd": _divisor,
    "lcm": _multiple,
    "max": _largest,
    "min": _smallest,
    "binom": _binomial,
    "log": _logarithm,
    "ln": _natural,
    "lg": _decimal,
    "exp": _real_call(_MP.exp, 1e8),
    **{name: _real_call(getattr(_MP, name), _SMALL) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: _real_call(getattr(_MP, name), 1e6) for name in ("sinh", "cosh", "tanh")},
    "arcsin": _real_call(_MP.asin, _SMALL),
    "arccos": _real_call(_MP.acos, _SMALL),
    "arctan": _real_call(_MP.atan, _SMALL),
    "arccot": _real_call(_MP.acot, _SMALL),
}
