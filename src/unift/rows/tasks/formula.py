"""A formula, in LaTeX or plain text, as a tree. The whole text is read or none of it (`FormulaError`).

A tree is a nested tuple: ("num", Fraction, decimal places written), ("sym", name), ("const", "pi" | "e" | "i" | "oo"),
("neg", a), ("add" | "mul" | "div" | "pow", a, b), ("degree", a), ("fact", a), ("fn", name, *arguments),
("apply", name, *arguments) for an unknown function such as f(x).

The text comes from a model and is never trusted: nothing is evaluated here, and length and depth are capped first.
"""

from __future__ import annotations

from fractions import Fraction

from unift.rows.tasks.signs import CONSTANTS, FUNCTIONS, MAX_DIGITS, SAME, FormulaError, Token, Tree, number, tokens_of

MAX_DEPTH = 24  # brackets, fractions, roots and exponents inside one another
TIMES, DIVIDE = {"*", "\\times", "\\cdot", "\\ast"}, {"/", "\\div"}
OPENERS = {"(": ")", "[": "]", "{": "}"}
ACCENTS = {"\\hat", "\\vec", "\\bar", "\\tilde", "\\dot", "\\ddot"}
UNKNOWN = {"f", "g", "h"}  # a letter that, before a bracket, is a function and not a factor


def parse_formula(text: str) -> Tree:
    """The tree of a whole text. Raises FormulaError."""
    return _Reader(tokens_of(text)).whole()


def nested(text: str) -> int:
    """How deep brackets and braces nest, counted without reading anything."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    return deepest


def symbols(tree: Tree) -> set[str]:
    """Names of the variables and unknown functions in a tree."""
    return {node[1] for node in _nodes(tree) if node[0] in ("sym", "apply")}


def functions(tree: Tree) -> set[str]:
    """Names of the known functions in a tree."""
    return {node[1] for node in _nodes(tree) if node[0] == "fn"}


def _nodes(tree: Tree) -> list[Tree]:
    """A tree and every tree inside it."""
    found = [tree]
    for node in found:  # grows meanwhile
        found += [part for part in node[1:] if isinstance(part, tuple)]
    return found


def _node(kind: str, *parts: object) -> Tree:
    """A tree that grows in a loop: the type of its tuple would grow with it."""
    return (kind, *parts)


class _Reader:
    """Recursive descent over the tokens. Products written side by side bind like a product with a sign."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def whole(self) -> Tree:
        if not self.tokens:
            raise FormulaError("nothing to read")
        tree = self.sum()
        if self.at < len(self.tokens):
            raise FormulaError(f"unexpected {self.tokens[self.at][1][:20]!r}")
        return tree

    # -------------------------------------------------------------------------------------------- tokens

    def peek(self, ahead: int = 0) -> Token:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else ("end", "", False)

    def take(self) -> Token:
        token = self.peek()
        if token[0] == "end":
            raise FormulaError("a part is missing at the end")
        self.at += 1
        return token

    def accept(self, *words: str) -> bool:
        if self.peek()[0] != "num" and self.peek()[1] in words and self.peek()[0] != "end":
            self.at += 1
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise FormulaError(f"{word!r} is missing")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise FormulaError(f"nested deeper than {MAX_DEPTH}")

    # -------------------------------------------------------------------------------------------- grammar

    def sum(self) -> Tree:
        self.deeper()
        tree = self.product()
        while True:
            if self.accept("+"):
                tree = _node("add", tree, self.product())
            elif self.accept("-"):
                tree = _node("add", tree, ("neg", self.product()))
            else:
                self.depth -= 1
                return tree

    def signs(self) -> bool:
        """Signs before a factor; whether they are negative together. Two at most: more are noise."""
        negative, count = False, 0
        while self.peek()[1] in ("+", "-") and self.peek()[0] == "punct":
            negative ^= self.take()[1] == "-"
            count += 1
            if count > 2:
                raise FormulaError("three signs in a row")
        return negative

    def product(self) -> Tree:
        negative = self.signs()
        tree = self.power()
        while True:
            kind, word, _ = self.peek()
            if kind == "punct" and word in TIMES | DIVIDE:
                self.at += 1
                minus = self.signs()
                right = self.power()
                right = ("neg", right) if minus else right
                tree = _node("mul" if word in TIMES else "div", tree, right)
            elif self.starts_factor(tree):
                tree = _node("mul", tree, self.power())
            else:
                break
        return ("neg", tree) if negative else tree

    def starts_factor(self, before: Tree) -> bool:
        kind, word, spaced = self.peek()
        if kind == "num" and not spaced and (before[2] if before[0] == "mul" else before)[0] == "fact":  # 3!7!
            return True
        if kind == "num":
            raise FormulaError(f"the number {word[:20]!r} follows another term without a sign")
        return kind == "name" or word in (
            "(", "[", "{", "\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil", "\\lvert", *ACCENTS
        )  # fmt: skip

    def power(self) -> Tree:
        tree, raised = self.primary(), False
        while True:
            if self.accept("!"):
                if raised or tree[0] == "fact":
                    raise FormulaError("an ambiguous factorial")
                tree = _node("fact", tree)
            elif self.peek()[1] in ("^", "**") and self.peek()[0] == "punct":
                self.at += 1
                if raised:
                    raise FormulaError("an ambiguous tower of powers")
                if self.degrees():
                    tree = _node("degree", tree)
                else:
                    self.deeper()
                    tree, raised = _node("pow", tree, self.exponent()), True
                    self.depth -= 1
            else:
                return tree

    def degrees(self) -> bool:
        braces = self.peek()[1] == "{" and self.peek(1)[1] == "\\circ" and self.peek(2)[1] == "}"
        if braces:
            self.at += 3
        return braces or self.accept("\\circ")

    def exponent(self) -> Tree:
        """A group, or one number or letter with a sign; a tower written without brackets groups from the right."""
        negative = self.signs()
        tree = self.group() if self.peek()[1] in OPENERS else self.primary()
        if self.peek()[0] == "punct" and self.peek()[1] in ("^", "**"):
            self.at += 1
            self.deeper()
            tree = ("pow", tree, self.exponent())
            self.depth -= 1
        return ("neg", tree) if negative else tree

    def group(self) -> Tree:
        opener = self.take()[1]
        tree = self.sum()
        self.expect(OPENERS[opener])
        return tree

    def argument(self) -> Tree:
        """What \\frac takes: a group, or one digit or letter."""
        kind, word, _ = self.peek()
        if word == "{":
            return self.group()
        if kind == "num" and len(word) > 1:
            self.tokens[self.at] = (kind, word[1:], False)
            if not word[0].isdecimal():
                raise FormulaError("a fraction without braces")
            return number(word[0])
        return self.primary()

    def primary(self) -> Tree:
        kind, word, _ = self.take()
        if kind == "num":
            return self.mixed(word)
        if kind == "name":
            return self.named(word)
        if word in OPENERS:
            self.at -= 1
            return self.group()
        if word in ("|", "\\lvert"):
            tree = self.sum()
            self.expect("|" if word == "|" else "\\rvert")
            return ("fn", "abs", tree)
        if word in ("\\lfloor", "\\lceil"):
            tree = self.sum()
            self.expect("\\rfloor" if word == "\\lfloor" else "\\rceil")
            return ("fn", "floor" if word == "\\lfloor" else "ceil", tree)
        if word == "\\frac":
            self.deeper()
            above = self.argument()
            tree = ("div", above, self.argument())
            self.depth -= 1
            return tree
        if word in ACCENTS:
            return self.accented(word)
        if word == "\\binom":
            above = self.argument()
            return ("fn", "binom", above, self.argument())
        raise FormulaError(f"unexpected {word[:20]!r}")

    def accented(self, accent: str) -> Tree:
        """\\hat{x}, \\vec F: a variable of its own."""
        braces = self.accept("{")
        kind, word, _ = self.take()
        if kind != "name" or word in FUNCTIONS:
            raise FormulaError(f"{accent} over something that is no letter")
        if braces:
            self.expect("}")
        self.tokens[self.at - 1] = ("name", f"{accent[1:]} {word}", False)
        self.at -= 1
        return self.named(self.take()[1])

    def mixed(self, word: str) -> Tree:
        """A number, with what may follow it: a repeating decimal, or the fraction of a mixed number."""
        tree = number(word)
        if self.peek()[1] == "\\overline":
            return self.repeating(word)
        if not word.isdecimal():
            return tree
        start = self.at
        pair = self.proper(self.peek()[1])
        if pair is None:
            self.at = start
            return tree
        above, below = pair
        if not 0 < above < below:
            raise FormulaError(f"{word} and {above}/{below} side by side: neither a mixed number nor a product")
        return ("num", tree[1] + Fraction(above, below), None)

    def proper(self, word: str) -> tuple[int, int] | None:
        """The two whole numbers of a fraction that stands right here, or None."""
        if word == "\\frac":
            self.at += 1
            parts: list[int] = []
            for _ in range(2):
                kind, text, _ = self.peek()
                if text == "{" and self.peek(1)[1].isdecimal() and self.peek(2)[1] == "}":
                    parts.append(int(self.peek(1)[1]))
                    self.at += 3
                elif kind == "num" and text.isdecimal() and len(text) == 1:
                    parts.append(int(text))
                    self.at += 1
                elif kind == "num" and text.isdecimal() and len(text) == 2 and not parts:
                    self.at += 1
                    return int(text[0]), int(text[1])
                else:
                    return None
            return parts[0], parts[1]
        (kind, above, spaced), (_, slash, _), (last, below, _) = self.peek(), self.peek(1), self.peek(2)
        if kind == last == "num" and spaced and slash == "/" and above.isdecimal() and below.isdecimal():
            self.at += 3
            return int(above[:MAX_DIGITS]), int(below[:MAX_DIGITS])
        return None

    def repeating(self, word: str) -> Tree:
        self.at += 1
        self.expect("{")
        kind, digits, _ = self.take()
        self.expect("}")
        odd = kind != "num" or not digits.isdecimal() or len(digits) > MAX_DIGITS
        if odd or "." not in word or "e" in word.lower():
            raise FormulaError("a repeating decimal that cannot be read")
        start = number(word)
        scale = 10 ** len(word.partition(".")[2])
        return ("num", start[1] + Fraction(int(digits), (10 ** len(digits) - 1) * scale), None)

    def named(self, word: str) -> Tree:
        if word in FUNCTIONS:
            return self.function(SAME.get(word, word))
        if self.peek()[1] == "_":
            self.at += 1
            return ("sym", self.marks(f"{word}_{self.subscript()}"))
        if word in CONSTANTS:
            return ("const", CONSTANTS[word])
        name = self.marks(word)
        if word in UNKNOWN and self.peek()[1] == "(" and not self.peek()[2]:
            return ("apply", name, *self.arguments())
        return ("sym", name)

    def marks(self, name: str) -> str:
        while self.accept("'", "\\prime"):
            name += "'"
        return name

    def subscript(self) -> str:
        if not self.accept("{"):
            return self.take()[1]
        words: list[str] = []
        while not self.accept("}"):
            words.append(self.take()[1])
            if len(words) > 20 or words[-1] == "{":
                raise FormulaError("a long subscript")
        return "".join(words)

    def arguments(self) -> list[Tree]:
        """A bracket with one or more parts."""
        self.expect("(")
        parts = [self.sum()]
        while self.accept(","):
            parts.append(self.sum())
        self.expect(")")
        return parts

    def function(self, name: str) -> Tree:
        """sin x, sin(x), sin^2 x, log_2 8, sqrt[3]{8}, max(a, b). Without a bracket it takes the product that follows."""
        self.deeper()
        if name in ("sqrt", "cbrt"):
            tree = self.root(name)
        else:
            base = power = None
            for _ in range(2):
                if self.peek()[1] == "_" and base is None and name == "log":
                    self.at += 1
                    base = self.group() if self.peek()[1] == "{" else self.argument()
                elif self.peek()[1] == "^" and power is None:
                    self.at += 1
                    power = self.exponent()
            if self.peek()[1] == "(":
                parts = self.arguments()
            elif self.peek()[1] == "{":
                parts = [self.group()]
            else:
                parts = [self.short_product()]
            if len(parts) > 1 and name not in ("gcd", "lcm", "max", "min", "log"):
                raise FormulaError(f"{name} of {len(parts)} things")
            inverse = power == ("neg", ("num", Fraction(1), None))
            if inverse and name in ("sin", "cos", "tan", "cot"):
                name, power = "arc" + name, None
            tree = ("fn", name, *parts) if base is None else ("div", ("fn", "ln", *parts), ("fn", "ln", base))
            tree = tree if power is None else ("pow", tree, power)
        self.depth -= 1
        return tree

    def root(self, name: str) -> Tree:
        index: Tree = ("num", Fraction(3 if name == "cbrt" else 2), None)
        if self.accept("["):
            index = self.sum()
            self.expect("]")
        _, word, _ = self.peek()
        inner = self.group() if word in ("{", "(") else self.primary()
        return ("fn", "root", inner, index)

    def short_product(self) -> Tree:
        """The argument of a function without a bracket: factors side by side, up to the next function."""
        negative = self.signs()
        tree = self.power()
        while (
            self.starts_factor(tree)
            and not (self.peek()[0] == "name" and self.peek()[1] in FUNCTIONS)
            and (self.peek()[1] not in OPENERS)
        ):
            tree = ("mul", tree, self.power())
        if self.peek()[1] == "/" and self.peek(1)[0] == "num":
            self.at += 1
            tree = ("div", tree, self.power())
        return ("neg", tree) if negative else tree
