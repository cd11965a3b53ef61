"""Small errors that a line of Python could have, and which tests to ask, for ``mutants.py``.

Docstrings, annotations, decorators, f-strings, ``__all__``, what is raised, and ``strict=`` are
left alone. All other lines of a mutant's source keep their numbers.
"""

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OWN_TESTS = {
    "mapkg/attack.py": "attack robustness",
    "studies/laws.py": "laws",
    "mapkg/nulls.py": "nulls",
    "mapkg/reporting.py": "reporting",
    "mapkg/measures.py": "measures laws",
    "mapkg/all_measures.py": "all_measures reporting",
    "mapkg/hooks.py": "hooks",
    "mapkg/lipschitz.py": "lipschitz",
    "mapkg/models/edge_attention.py": "edge_attention layers",
    "mapkg/lipschitz_norm.py": "norms lipschitz",
    "mapkg/oversmoothing.py": "smoothing backward_oversmoothing",
}
"""The modules, and those tests/test_*.py that bear their name or test what they export."""

NOT_QUICK = "architecture book notebooks packaging viewer workflow"
"""Tests of the text of the repository, and those that need the book or other processes."""

OPERATORS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.Pow: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.MatMult: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And},  # | is mostly of types
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In},
}
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
PAIRS = "amax amin, sum mean, max min, any all, argmax argmin, floor ceil, ones_like zeros_like"
NAMES = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
"""Of functions, methods, arguments, and strings that are arguments."""

AXES = ("dim", "axis")
"""Arguments that keep their minus, since the last axis of a matrix is its axis 1."""

DROPPED = ("abs", "clamp", "clip", "exp", "log", "log10", "sqrt", "square", "tanh")
"""Functions and methods whose argument a mutant has in place of their value."""


@dataclass(frozen=True)
class Mutant:
    """One change of one line; equal wherever the line is, if it is as often there."""

    module: str
    line: int
    text: str  # of the line
    occurrence: int  # of this mutation among equal lines
    mutation: str
    mutated: str  # the line

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What identifies it, which is not the number of the line."""
        return self.module, self.text, self.occurrence, self.mutation

    @property
    def id(self) -> str:
        """The key in short."""
        return hashlib.sha256("\n".join(map(str, self.key)).encode()).hexdigest()[:10]


def mutants_of(checkout: Path, module: str) -> dict[Mutant, bytes]:
    """All mutants of a module, with their sources."""
    source = (checkout / module).read_bytes()
    lines = source.decode().splitlines()
    seen, found = Counter(), {}
    for node, parent in _visited(ast.parse(source)):
        for mutation, new in _changes(node, parent):
            text = lines[node.lineno - 1].strip()
            changed = _spliced(source, node, new)
            mutated = changed.decode().splitlines()[node.lineno - 1].strip()
            mutant = Mutant(module, node.lineno, text, seen[text, mutation], mutation, mutated)
            seen[text, mutation] += 1
            found[mutant] = changed
    return found


def drawn(checkout: Path, modules: Iterable[str], number: int, seed: int) -> dict[Mutant, bytes]:
    """So many mutants, of each module in proportion to how many it has."""
    every = {module: mutants_of(checkout, module) for module in modules}
    total = sum(map(len, every.values()))
    number = min(number, total)
    quotas = {module: number * len(found) / total for module, found in every.items()}
    share = {module: int(quota) for module, quota in quotas.items()}
    by_rest = sorted(every, key=lambda module: share[module] - quotas[module])
    for module in by_rest[: number - sum(share.values())]:
        share[module] += 1
    chosen = {}
    for module, found in every.items():
        # By a hash, not by a generator: another line elsewhere does not change the draw.
        order = sorted(found, key=lambda m: hashlib.sha256(f"{seed} {m.id}".encode()).digest())
        chosen |= {m: found[m] for m in sorted(order[: share[module]], key=lambda m: m.line)}
    return chosen


def own_tests(checkout: Path, module: str) -> list[str]:
    """The test files of a module."""
    files = [f"tests/test_{name}.py" for name in OWN_TESTS[module].split()]
    return [name for name in files if (checkout / name).exists()]


def other_tests(checkout: Path, module: str) -> list[str]:
    """All other quick ones that import the module, and first those that name it."""
    left_out = [f"tests/test_{name}.py" for name in NOT_QUICK.split()]
    left_out += own_tests(checkout, module)
    named = re.compile(rf"\b{Path(module).stem}\b")
    found = []
    for path in sorted(checkout.glob("tests/test_*.py")):
        name = f"tests/{path.name}"
        if name not in left_out and checkout / module in _reached(checkout, path):
            found.append((named.search(path.read_text()) is None, name))
    return [name for _, name in sorted(found)]


@cache
def _reached(checkout: Path, path: Path) -> set[Path]:
    """The files of a checkout that a file imports, be it through others."""
    reached, waiting = {path}, [path]
    while waiting:
        new = _imported(checkout, waiting.pop()) - reached
        reached |= new
        waiting += new
    return reached


@cache
def _imported(checkout: Path, path: Path) -> set[Path]:
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    inner = {checkout.joinpath(*part[:end]) for part in parts for end in range(1, len(part) + 1)}
    files = {file for path in inner for file in (path.with_suffix(".py"), path / "__init__.py")}
    return {file for file in files if file.is_file()}


def _visited(node: ast.AST, parent: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.AST]]:
    """All nodes that may change, with their parents."""
    yield node, parent
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            is_all = isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__all__"
            is_strict = isinstance(child, ast.keyword) and child.arg == "strict"
            if (
                isinstance(child, ast.AST)
                and field not in ("annotation", "returns", "decorator_list")
                and not (isinstance(child, ast.Raise | ast.JoinedStr) or is_all or is_strict)
            ):
                yield from _visited(child, node)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    """The same node but for some fields."""
    return type(node)(**{name: getattr(node, name) for name in node._fields} | fields)


def _changes(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[str, ast.AST]]:
    """What else could be there, each with a name."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            new = OPERATORS[type(op)]
            yield f"{type(op).__name__} -> {new.__name__}", _with(node, op=new())
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                new = OPERATORS[type(op)]
                changed = _with(node, ops=[*ops[:i], new(), *ops[i + 1 :]])
                yield f"{type(op).__name__} -> {new.__name__}", changed
        case ast.UnaryOp(op=op, operand=operand) if getattr(parent, "arg", None) not in AXES:
            yield f"no {type(op).__name__}", operand
        case ast.Constant(value=bool() as value):
            yield f"{value} -> {not value}", ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            new = value + 1 if isinstance(value, int) or value == 0 else 2 * value
            if isinstance(parent, ast.Subscript) and value in (0, 1):
                new = 1 - value
            yield f"{value} -> {new}", ast.Constant(new)
        case ast.Constant(value=value) if isinstance(parent, ast.Call | ast.keyword):
            if value in NAMES:
                yield f"{value!r} -> {NAMES[value]!r}", ast.Constant(NAMES[value])
        case ast.keyword(arg=name) if name in NAMES:
            yield f"{name}= -> {NAMES[name]}=", _with(node, arg=NAMES[name])
        case ast.Call(func=ast.Name(id=name) as function, args=[inside, *_]):
            if name in NAMES:
                new = _with(node, func=_with(function, id=NAMES[name]))
                yield f"{name} -> {NAMES[name]}", new
            if name in DROPPED:
                yield f"no {name}", inside
        case ast.Call(func=ast.Attribute(value=of, attr=name) as function, args=args):
            if name in NAMES:
                new = _with(node, func=_with(function, attr=NAMES[name]))
                yield f"{name} -> {NAMES[name]}", new
            if name in DROPPED:
                is_function = getattr(of, "id", None) in ("math", "np", "torch")
                yield f"no {name}", args[0] if is_function else of
        case ast.Assign(targets=[ast.Tuple(elts=[first, second]) as names]):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                swapped = _with(names, elts=[second, first])
                yield "swapped", _with(node, targets=[swapped], lineno=node.lineno)
    if isinstance(parent, ast.If | ast.While | ast.IfExp | ast.comprehension) and (
        node is getattr(parent, "test", None) or node in getattr(parent, "ifs", ())
    ):
        # Other comparisons, and what is negated, have their negation already.
        is_order = isinstance(node, ast.Compare) and isinstance(node.ops[0], ORDERS)
        if is_order or not isinstance(node, ast.UnaryOp | ast.Compare):
            yield "negated", ast.UnaryOp(ast.Not(), node)


def _spliced(source: bytes, node: ast.AST, new: ast.AST) -> bytes:
    """The source with a node replaced."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    text = ast.unparse(new) + "\n" * source.count(b"\n", begin, end)
    return (
        source[:begin]
        + (f"({text})" if isinstance(node, ast.expr) else text).encode()
        + source[end:]
    )
