r"""Where the final answer of a text stands, and the form in which two answers are compared as text.

Pure Python, linear in the length of the text: it runs in the training process on whatever a model writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

from distillkit.errors import DataError, problem

__all__ = ["clean", "final_answer", "gold_answer", "gold_cell", "last_boxed", "normal_form", "plain_number"]

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed\s+(?P<bare>[^\s${}\\]+)|\\.|[{}]", re.DOTALL)
_ANCHOR = re.compile(r"(?i)\banswer(?: to [^\n.:$]{1,80})?(?: is\b|[ *]{0,4}:)[ \t*:=]{0,8}")
_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"
_NUMBER_LINE = re.compile(rf"(?:\\?\$|€|£)?\s?(?P<number>{_NUMBER}\s?\\?%?)\.?")
_LEADING_NUMBER = re.compile(rf"(?:\\?\$|€|£)?\s?(?P<number>{_NUMBER})(?=[\s.,;!?*)]|$)(?!\s?[-+*/^=\u00d7\u00f7])")
_ANOTHER = re.compile(r"\s?\*{0,2}\s?(?:,|;|&|or\b|and\b|to\b)\s?\*{0,2}[-\\$(\d]")
_MATH = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))

_THOUSANDS = r"(?:,|\{,\}|\\[,;: !]|,\\!|[ ~])"
_PLAIN = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<grouped>\d{{1,3}}(?:{_THOUSANDS}\d{{3}}){{1,12}})|(?P<digits>\d{{1,60}}))?"
    r"(?:\.(?P<decimals>\d{0,60}))?(?:[eE](?P<exponent>[-+]?\d{1,2}))?"
)
_LATEX = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u00b0": r"^\circ ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u222a": r"\cup ",
        "\u2208": r"\in ",
        "\u00a0": " ",
        "\u202f": " ",
    }
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[,;:!]|\\ ")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")


def gold_cell(row: Mapping[str, Any], column: str, reward: str) -> Any:
    """Return `row[column]`.

    Raises:
        DataError: the row has no such column.
    """
    if column in row:
        return row[column]
    raise DataError(
        problem(
            f"reward {reward}: the data has no column {column!r}",
            got=", ".join(map(str, row)) or "a row without columns",
            expected=f"a column with the reference, named {column!r} or by the reward's argument",
        )
    )


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}`, or None when there is none or it is not closed.

    Braces are balanced, escaped ones (`\{`) do not count, and of nested boxes it is the inner one.

    Example:
        >>> last_boxed(r"First \boxed{1}, no: $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
        >>> last_boxed(r"\boxed{1} and then \boxed{2") is None
        True
    """
    opened: list[int | None] = []
    best: tuple[int, str] | None = None
    newest = -1
    for token in _BOX_OR_BRACE.finditer(text):
        piece = token.group()
        if token["bare"] is not None:
            newest = token.start()
            best = (newest, token["bare"])
        elif piece == "{":
            opened.append(None)
        elif piece == "}":
            start = opened.pop() if opened else None
            if start is not None and (best is None or start > best[0]):
                best = (start, text[start : token.start()])
        elif piece.startswith(("\\boxed", "\\fbox")):
            newest = token.end()
            opened.append(newest)
    return best[1].strip() if best is not None and best[0] == newest else None


def final_answer(text: str, *, require_boxed: bool = False) -> str | None:
    r"""Return the final answer that `text` gives, or None.

    The first of these that is there: the last `\boxed{...}`; a last line `#### ...`; what follows the last "answer is"
    or "answer:"; a last line that is nothing but a number, or a formula in dollars.

    Example:
        >>> final_answer(r"So $x=3$ and the answer is $\frac12$."), final_answer("9 + 9 = 18\n#### 18")
        ('\\frac12', '18')
        >>> final_answer("I think it is 18 or so") is None
        True
    """
    if r"\boxed" in text or r"\fbox" in text:
        return last_boxed(text) or None
    if require_boxed:
        return None
    last_line = text.rstrip().rpartition("\n")[2].strip()
    if "####" in last_line:
        return last_line.rpartition("####")[2].strip() or None
    for anchor in reversed(list(_ANCHOR.finditer(text))):
        if stated := _stated(text[anchor.end() :].lstrip().partition("\n")[0].strip()):
            return stated
    last_line = last_line.strip("*").strip()
    if number := _NUMBER_LINE.fullmatch(last_line):
        return number["number"]
    formula = _leading_formula(last_line.rstrip("."))
    return formula[0] if formula and not formula[1] else None


def _stated(line: str) -> str | None:
    """Return the answer that the words after "answer is" begin with; all of them when they begin with several."""
    everything = line.strip("*").rstrip(" .").strip("*") or None
    if formula := _leading_formula(line):
        return everything if _ANOTHER.match(formula[1]) else formula[0]
    if number := _LEADING_NUMBER.match(line):
        return everything if _ANOTHER.match(line, number.end()) else number["number"]
    return everything


def _leading_formula(line: str) -> tuple[str, str] | None:
    for begin, end in _MATH:
        if line.startswith(begin) and (stop := line.find(end, len(begin))) > 0:
            inner = line[len(begin) : stop].strip()
            return (inner, line[stop + len(end) :]) if inner else None
    return None


def gold_answer(value: object) -> str | None:
    r"""Return the answer that a dataset cell gives, or None when it gives none.

    A number is written out; of a text it is what follows the last `####` (GSM8K), else the last `\boxed{...}` (a MATH
    solution), else the whole of it.

    Example:
        >>> gold_answer(27.0), gold_answer("3 * 6 = 18\n#### 18"), gold_answer(None)
        ('27', '18', None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Rational):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, Real | Decimal):
        if not math.isfinite(value):
            return None
        text = format(value if isinstance(value, Decimal) else Decimal(repr(float(value))), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    if not isinstance(value, str):
        return None
    if "####" in value:
        return value.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    if r"\boxed" in value or r"\fbox" in value:
        return last_boxed(value) or None
    return value.strip() or None


def plain_number(answer: str) -> Fraction | None:
    r"""Return the value of an integer or decimal, with thousands separators and a currency sign or not; else None.

    Example:
        >>> plain_number(r"\$1,000.50"), plain_number("12,3"), plain_number(r"\frac12")
        (Fraction(2001, 2), None, None)
    """
    text = clean(answer).removeprefix("\\$").removeprefix("$").lstrip()
    match = _PLAIN.fullmatch(text)
    if match is None or not (match["grouped"] or match["digits"] or match["decimals"]):
        return None
    whole = re.sub(r"\D", "", match["grouped"]) if match["grouped"] else match["digits"] or "0"
    value = Fraction(int(whole + (match["decimals"] or "")), 10 ** len(match["decimals"] or ""))
    value *= Fraction(10) ** int(match["exponent"] or 0)
    return -value if match["sign"] == "-" else value


def normal_form(answer: str) -> str:
    r"""Return the form in which two answers are compared as text, and vote in `maj@k`.

    Equal forms are equal answers; unequal forms may still be equal as mathematics. A plain number becomes `18`, `-3` or
    `1/2`; otherwise the enclosing dollars, spacing, `\left`, `\right` and the wrappers of text go, and `\dfrac` and
    `\tfrac` become `\frac`.

    Example:
        >>> [normal_form(a) for a in (r"27.0", r"\$1,000", "0.5", r"\text{(C)}", r"\left( 3, \dfrac{\pi}{2} \right)")]
        ['27', '1000', '1/2', '(C)', '(3,\\frac{\\pi}{2})']
    """
    number = plain_number(answer)
    if number is not None:
        return str(number)
    text = _SPACING.sub(" ", _TEXT.sub(r" \1 ", clean(answer)))
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return _LOOSE_SPACE.sub("", " ".join(text.split()))


def clean(answer: str) -> str:
    r"""Return `answer` without enclosing dollars or braces and a final full stop, with Unicode signs in LaTeX."""
    text = answer.translate(_LATEX).strip()
    if _is_one_group(text):
        text = text[1:-1].strip()
    for begin, end in _MATH:
        inner = text[len(begin) : len(text) - len(end)]
        if text.startswith(begin) and text.endswith(end) and inner and begin not in inner and end not in inner:
            text = inner.strip()
            break
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith(("..", "\\.")) else text


def _is_one_group(text: str) -> bool:
    """Whether `text` is one pair of braces and what they enclose."""
    if not (text.startswith("{") and text.endswith("}")):
        return False
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return token.end() == len(text)
    return False
