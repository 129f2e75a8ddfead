"""Small changes to Python source, made on its syntax tree. Used by `mutation_check.py`."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
OTHER_METHOD = {
    "sequence_mean": "sequence_sum",
    "sequence_sum": "sequence_mean",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "expm1": "exp",
    "exp": "expm1",
}
DROPPED_METHODS = ("detach", "clamp", "abs")
"""``x.method(...)`` becomes ``x``: a stop-gradient or a bound is lost."""
DROPPED_KEYWORDS = ("over", "loss", "high", "low", "min", "max")
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "bases")

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "sft.py",
        "changed=torch.zeros_like(batch.mask) -> changed=torch.zeros_like(batch.logp)",
    ): "false and 0.0 are the same",
    ("__init__.py", "1 -> 2"): "asks difflib for two close names and shows the first, which stays the same",
}
"""(file, change) -> why no test can see it."""


@dataclass(frozen=True)
class Mutant:
    """A file's source with one change."""

    file: str
    line: int
    change: str
    source: str


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file."""
    tree = ast.parse(path.read_text())
    for parent, field, index, node in list(_sites(tree)):
        for changed in _changes(node, parent):
            _put(parent, field, index, changed)
            source = ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, index, node)
            before, after = _difference(node, changed)
            yield Mutant(path.name, node.lineno, f"{before} -> {after}", source)


def _sites(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every place in the tree that may be changed: parent, field, index in the field, node."""
    for field, value in ast.iter_fields(node):
        if field in SKIPPED_FIELDS or isinstance(node, ast.Raise):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_text(child):
                continue
            if hasattr(child, "lineno"):
                yield node, field, index, child
            yield from _sites(child)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _changes(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """What a node may become."""
    match node:
        case ast.Call():
            yield from _call_changes(node)
        case ast.Compare(ops=[op]):
            for other in COMPARISONS.get(type(op), ()):
                yield _with(node, ops=[other()])
        case ast.BinOp(op=op):
            if type(op) in ARITHMETIC:
                yield _with(node, op=ARITHMETIC[type(op)]())
                yield node.left
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield node.operand
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.If():
            yield _with(node, test=ast.Constant(False))
            yield _with(node, test=ast.Constant(True))
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=(int() | float()) as value):
            yield ast.Constant(value + 1)
        case ast.Set() if len(node.elts) == 1 and not isinstance(parent, ast.IfExp):
            yield ast.Call(ast.Name("set"), [], [])
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()  # a check that is not made


def _call_changes(call: ast.Call) -> Iterator[ast.AST]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in DROPPED_METHODS:
        yield call.func.value
    if name == "trained":
        yield call.args[0]
    if name == "where":
        yield from call.args[1:]
    if name == "clamp" and len(call.args) == 2:
        yield _with(call, args=[], keywords=[ast.keyword("max", call.args[1])])
        yield _with(call, args=[call.args[0]])
    if name in OTHER_METHOD:
        yield _with(call, func=_with(call.func, attr=OTHER_METHOD[name]))
    for keyword in call.keywords:
        others = [k for k in call.keywords if k is not keyword]
        if keyword.arg in DROPPED_KEYWORDS:
            yield _with(call, keywords=others)
        elif name == "token_loss" and keyword.arg:
            nothing = ast.parse("torch.zeros_like(batch.logp)", mode="eval").body
            yield _with(
                call, keywords=[ast.keyword(keyword.arg, nothing) if k is keyword else k for k in call.keywords]
            )


def _difference(node: ast.AST, changed: ast.AST) -> tuple[str, str]:
    """What was there and what is there now; of a call that lost or changed one keyword, only that keyword."""
    if isinstance(node, ast.Call) and isinstance(changed, ast.Call) and node.keywords and node.args == changed.args:
        kept = {k.arg: ast.unparse(k) for k in changed.keywords}
        for keyword in node.keywords:
            if kept.get(keyword.arg) != ast.unparse(keyword):
                return ast.unparse(keyword), kept.get(keyword.arg, "dropped")
    return _short(node), _short(changed)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    """A shallow copy with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_text(node: ast.AST) -> bool:
    """A docstring or any other string, which is not code."""
    inner = node.value if isinstance(node, ast.Expr) else node
    return isinstance(inner, ast.JoinedStr) or (isinstance(inner, ast.Constant) and isinstance(inner.value, str))


def _short(node: ast.AST) -> str:
    """The node's source on one line; of a compound statement, its head."""
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).partition("\n")[0]
    return text if len(text) <= 110 else text[:107] + "..."
