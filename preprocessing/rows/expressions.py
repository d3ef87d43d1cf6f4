"""Conditions on the columns of a block, such as `rating > 3` or `action in [1, 2] and seconds >= 30`, as labels."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.encoding.conversions import present

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], pa.Array]] = {
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.GtE: ast.LtE, ast.LtE: ast.GtE}
_SIGNS: dict[type[ast.cmpop], str] = {
    **{ast.Gt: ">", ast.GtE: ">=", ast.Lt: "<", ast.LtE: "<=", ast.Eq: "==", ast.NotEq: "!="},
    **{ast.In: "in", ast.NotIn: "not in"},
}
_WORDS = {"true": True, "false": False}
_GRAMMAR = (
    "a condition compares columns with constants, COLUMN > 3, COLUMN == 'yes', COLUMN in [1, 2], and may join several with"
    " and, or, not; a column whose name is no plain word stands in backquotes"
)
_OPERATOR = re.compile(r"[<>=]| in ")
#: A string, or a column in backquotes, which are doubled within.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`(?P<column>(?:[^`]|``)+)`""")
_FIRST_COLUMN = re.compile(r"([^<>=!'\"`]*?[^<>=!'\"`\s])(\s*(?:[<>]=?|[=!]=)|\s+(?:not\s+)?in\s)(.*)")
_EXACT = 2**53  # below it float64 holds every integer
_KINDS = {bool: pa.bool_(), int: pa.float64(), float: pa.float64(), str: pa.string()}


@dataclass(frozen=True)
class Condition:
    """A parsed condition.

    Attributes:
        text: as it was written.
        columns: the columns in it -> bool, float64, string, or int64 beside integers that float64 does not tell apart, by the
            constants that they are compared with.
    """

    text: str
    columns: dict[str, pa.DataType]

    def evaluate(self, table: pa.Table) -> pa.Array:
        """[rows] bool; null where a missing value leaves it open: `a and b` is false when one of them is."""
        return _evaluate(_tree(self.text), table)

    def facts(self) -> list[Any]:
        """What it says as nested lists, equal for texts that differ in blanks, sides or order only."""
        return _facts(_tree(self.text))


def parse_condition(text: str) -> Condition:
    """Raises ValueError where the text is no condition, with what may be meant."""
    try:
        return _parsed(text)
    except ValueError as error:
        likely = _likely(text)
        raise ValueError(f"{error}.{likely}" if likely else str(error)) from None


def _parsed(text: str) -> Condition:
    try:
        tree = _tree(text)
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} cannot be read: {_GRAMMAR}") from None
    columns: dict[str, pa.DataType] = {}
    for column, kind in _compared(tree, text):
        before = columns.setdefault(column, kind)
        if {before, kind} == {pa.int64(), pa.float64()}:
            columns[column] = pa.int64()
        elif before != kind:
            raise ValueError(f"{text!r} compares {column} with constants of two kinds")
    return Condition(text, columns)


def _likely(text: str) -> str:
    """A sentence that puts a column into backquotes, where that makes a condition of the text, or a column; else empty."""
    found = _FIRST_COLUMN.fullmatch(text)
    if found is not None:
        meant = f"`{found[1]}`{found[2]}{found[3]}"
        with contextlib.suppress(ValueError):
            _parsed(meant)
            return f' Perhaps "{meant}" is meant'
    return "" if re.search("[<>=`]", text) else f' Where it is the name of a column, write "`{text}`"'


def quoted_column(text: str) -> str | None:
    """The column, where the whole text is one in backquotes."""
    found = _QUOTED.fullmatch(text.strip())
    return _unquoted(found) if found and found["column"] is not None else None


def has_operator(text: str) -> bool:
    """Whether anything is compared in a text, outside of quotes."""
    return _OPERATOR.search(_QUOTED.sub("''", text)) is not None


class _Names(ast.NodeTransformer):
    """Names as they are meant: columns in backquotes by what stands in these, `true` and `false` as constants."""

    def __init__(self, quoted: dict[str, str]) -> None:
        self._quoted = quoted

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._quoted:
            return ast.Name(self._quoted[node.id], node.ctx)
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def _tree(text: str) -> ast.expr:
    """What Python makes of a text, with words of its own for columns in backquotes. Raises SyntaxError or ValueError."""
    word = "_"
    while word in text:
        word += "_"
    quoted: dict[str, str] = {}

    def stand_in(found: re.Match[str]) -> str:
        if found["column"] is None:  # a string
            return found[0]
        name = f"{word}{len(quoted)}"
        quoted[name] = _unquoted(found)
        return f" {name} "

    tree = ast.parse(_QUOTED.sub(stand_in, text).strip(), mode="eval").body
    meant: ast.expr = _Names(quoted).visit(tree)
    return meant


def _unquoted(found: re.Match[str]) -> str:
    return found["column"].replace("``", "`")


def _compared(node: ast.expr, text: str) -> list[tuple[str, pa.DataType]]:
    """Each column with the type of the constants beside it. Raises ValueError."""
    if isinstance(node, ast.BoolOp):
        return [found for value in node.values for found in _compared(value, text)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _compared(node.operand, text)
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        pairs = list(zip(operands[:-1], node.ops, operands[1:], strict=True))
        return [_comparison(*pair, text)[1:3] for pair in pairs]
    raise ValueError(f"{text!r}: {_GRAMMAR}")


def _comparison(left: ast.expr, op: ast.cmpop, right: ast.expr, text: str) -> tuple[type[ast.cmpop], str, pa.DataType, Any]:
    """Operator, column, type and constant of `column op constant`; `constant op column` is turned round."""
    kind = type(op)
    if not isinstance(left, ast.Name) and isinstance(right, ast.Name) and not isinstance(op, ast.In | ast.NotIn):
        left, right, kind = right, left, _TURNED.get(kind, kind)
    if not isinstance(left, ast.Name) or kind not in (*_COMPARISONS, ast.In, ast.NotIn):
        raise ValueError(f"{text!r}: {_GRAMMAR}")
    try:
        value = ast.literal_eval(right)
    except (ValueError, SyntaxError):
        raise ValueError(f"{text!r}: {_GRAMMAR}") from None
    several = isinstance(op, ast.In | ast.NotIn)
    constants: list[Any] = list(value) if isinstance(value, list | tuple | set) else [value]
    if several != isinstance(value, list | tuple | set) or not constants:
        raise ValueError(f"{text!r}: {left.id} needs {'a list such as [1, 2]' if several else 'one constant'} beside it")
    kinds = {_KINDS.get(type(each)) for each in constants}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"{text!r}: constants beside {left.id} must all be numbers, all strings, or true or false")
    if any(isinstance(each, int) and not -(2**63) <= each < 2**63 for each in constants):
        raise ValueError(f"{text!r}: a constant beside {left.id} does not fit into 64 bits")
    if any(isinstance(each, int) and abs(each) >= _EXACT for each in constants):
        return kind, left.id, pa.int64(), value
    return kind, left.id, kinds.pop(), value


def _evaluate(node: ast.expr, table: pa.Table) -> pa.Array:
    if isinstance(node, ast.BoolOp):
        join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        found = _evaluate(node.values[0], table)
        for value in node.values[1:]:
            found = join(found, _evaluate(value, table))
        return found
    if isinstance(node, ast.UnaryOp):
        return pc.invert(_evaluate(node.operand, table))
    assert isinstance(node, ast.Compare)
    operands = [node.left, *node.comparators]
    found = None
    for left, op, right in zip(operands[:-1], node.ops, operands[1:], strict=True):
        kind, name, _, value = _comparison(left, op, right, "")
        column = present(table[name].combine_chunks())
        if kind in _COMPARISONS:
            result = _compare(_COMPARISONS[kind], column, value)
        else:
            result = _among(column, list(value))
            result = pc.invert(result) if kind is ast.NotIn else result
        found = result if found is None else pc.and_kleene(found, result)
    return found


def _among(column: pa.Array, values: list[Any]) -> pa.Array:
    """Whether a value is one of these; null stays null. Compared one by one, so that 3.0 is 3 whatever the types."""
    found = _compare(pc.equal, column, values[0])
    for value in values[1:]:
        found = pc.or_kleene(found, _compare(pc.equal, column, value))
    return found


def _compare(function: Callable[[Any, Any], pa.Array], column: pa.Array, value: Any) -> pa.Array:
    """Arrow refuses to compare integers beyond 2^53 with floats; as floats they are rounded."""
    if isinstance(value, bool) and not pa.types.is_boolean(column.type):
        value = int(value)  # a column that is read as numbers for another use, too
    if isinstance(value, float) and pa.types.is_integer(column.type):
        column = column.cast(pa.float64(), safe=False)
    elif isinstance(value, int) and pa.types.is_floating(column.type):
        value = float(value)
    return function(column, value)


def _facts(node: ast.expr) -> list[Any]:
    if isinstance(node, ast.BoolOp):
        return _joined("and" if isinstance(node.op, ast.And) else "or", [_facts(value) for value in node.values])
    if isinstance(node, ast.UnaryOp):
        return ["not", _facts(node.operand)]
    assert isinstance(node, ast.Compare)
    operands = [node.left, *node.comparators]
    found: list[Any] = []
    for left, op, right in zip(operands[:-1], node.ops, operands[1:], strict=True):
        kind, name, _, value = _comparison(left, op, right, "")
        several = kind in (ast.In, ast.NotIn)
        constant: Any = _each_once([_plain(each) for each in value]) if several else _plain(value)
        found.append([_SIGNS[kind], name, constant])
    return _joined("and", found)


def _joined(word: str, operands: list[Any]) -> list[Any]:
    flat = [part for each in operands for part in (each[1:] if each[0] == word else [each])]
    return [word, *_each_once(flat)] if len(flat) > 1 else flat[0]


def _each_once(values: list[Any]) -> list[Any]:
    return [json.loads(text) for text in sorted({json.dumps(value) for value in values})]


def _plain(constant: Any) -> Any:
    """3.0 is 3, and an infinite number, which JSON cannot hold, a word."""
    if not isinstance(constant, float):
        return constant
    if not math.isfinite(constant):
        return str(constant)
    return int(constant) if constant.is_integer() and abs(constant) < _EXACT else constant
