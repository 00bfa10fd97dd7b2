"""Finds the mutants of a Python file: changes of its text in one place each (ci/mutants.py)."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}  # fmt: skip
# Keyword arguments that say nothing a test could see: texts for people, the encoding that the machine has anyway, and
# zip's own assertion.
SILENT_KEYWORDS = {"encoding", "help", "metavar", "strict"}
LOGGERS = {"logger", "logging", "warnings"}
MOST_SHOWN = 150  # characters of a mutant, before and after


@dataclass(frozen=True)
class Mutant:
    """The text `after` in the place of bytes `begin` to `end` of a file; `shown` says so in one line."""

    path: str
    line: int
    begin: int
    end: int
    after: str
    shown: str
    function: str  # PATH:QUALIFIED NAME of the function around it; "" outside of functions
    key: str  # a name that stays when other lines of the file change


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, path: str, text: str) -> None:
        self.found: list[Mutant] = []
        self._scopes: list[str] = []  # qualified name, in pieces
        self._function = ""
        self._counts: Counter[str] = Counter()
        self._path, self._data = path, text.encode()
        self._starts = [0]
        for line in self._data.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self.visit(ast.parse(text))

    def _add(self, node: ast.expr | ast.stmt, after: str, shown: str = "") -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        before = " ".join(self._data[begin:end].decode().split())
        shown = shown or f"{before[:MOST_SHOWN]} -> {after[:MOST_SHOWN]}"
        self._counts[shown] += 1
        key = f"{self._path}: {shown} #{self._counts[shown]}"
        self.found.append(Mutant(self._path, node.lineno, begin, end, after, shown, self._function, key))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *(value for value in node.args.kw_defaults if value)):
            self.visit(default)
        around = self._function
        self._function = f"{self._path}:{'.'.join((*self._scopes, node.name))}"
        self._scopes += [node.name, "<locals>"]
        for statement in node.body:
            self.visit(statement)
        del self._scopes[-2:]
        self._function = around

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scopes.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._scopes.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:  # before Python 3.12 without its own places
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add(node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        value = node.value
        if isinstance(value, ast.Constant) or ast.unparse(value).split(".")[0] in LOGGERS:
            return
        self._add(node, "pass")
        self.visit(value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._add(node, "return None")
            self.visit(node.value)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add(node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self._add(node, "pass")

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._add(node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add(node, "pass")
        changed = OPERATIONS.get(type(node.op))
        if changed:
            self._add(node, ast.unparse(ast.AugAssign(node.target, changed(), node.value)))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "__name__ == '__main__'"):
            self._negate(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        # Where these are negated, that is the mutant.
        if not isinstance(test, ast.Compare) and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self._add(test, f"not ({ast.unparse(test)})")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add(node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        swapped = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._add(node, f"({ast.unparse(ast.BoolOp(swapped, node.values))})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for index, operator in enumerate(node.ops):
            operators = [*node.ops[:index], COMPARISONS[type(operator)](), *node.ops[index + 1 :]]
            self._add(node, f"({ast.unparse(ast.Compare(node.left, operators, node.comparators))})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        alternatives = [value for value in (node.left, node.right) if ast.unparse(value) == "None"]
        changed = OPERATIONS.get(type(node.op))
        if changed and not alternatives:  # `int | None` is a type
            self._add(node, f"({ast.unparse(ast.BinOp(node.left, changed(), node.right))})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add(node, str(not value))
        elif isinstance(value, int | float):
            self._add(node, repr(value + 1))
            self._add(node, repr(value - 1))

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound, step in ((node.lower, "+ 1"), (node.upper, "- 1")):
            if bound and not isinstance(bound, ast.Constant):
                self._add(bound, f"({ast.unparse(bound)} {step})")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).split(".")[0] in LOGGERS:
            return
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in SILENT_KEYWORDS:
                kept = [other for other in node.keywords if other is not keyword]
                shown = f"{ast.unparse(node.func)}(..., {ast.unparse(keyword)[:MOST_SHOWN]}) -> without"
                self._add(node, ast.unparse(ast.Call(node.func, node.args, kept)), shown)
        for value in (node.func, *node.args):
            self.visit(value)
        for keyword in node.keywords:
            if keyword.arg not in SILENT_KEYWORDS:
                self.visit(keyword.value)
