"""The two packages: who may import what, and what every module has."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

import mapkg

REPOSITORY = Path(__file__).parents[1]
MAX_LINES = 400

LIBRARY_NEEDS = {"torch", "torch_geometric", "numpy", "scipy", "pandas", "jaxtyping", "tqdm"}
"""What ``mapkg`` may import beside Python's own modules."""

MODULES = {
    path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", "."): path
    for package in ("mapkg", "studies")
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}
"""Files by dotted name, for example ``studies.data.molecules`` or ``studies.data.__init__``."""

each_module = pytest.mark.parametrize("module", MODULES)


def tree_of(module):
    return ast.parse(MODULES[module].read_text())


def module_named(dotted):
    """The module of that name: a file, a folder's ``__init__``, or None."""
    return next((name for name in (dotted, f"{dotted}.__init__") if name in MODULES), None)


def imports_of(tree):
    """Modules that a file imports, wherever in the file it does so; ours by their files."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            # "from mapkg import hooks" is an import of mapkg.hooks, not of mapkg's own names.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if module_named(name) else node.module for name in inner}
    return {module_named(name) or name for name in found}


@each_module
def test_what_a_module_imports_is_below_it(module):
    packages = {name.partition(".")[0] for name in imports_of(tree_of(module))}
    if module.startswith("mapkg."):
        assert packages <= LIBRARY_NEEDS | {"mapkg"} | sys.stdlib_module_names
    else:
        assert not packages & {"notebooks", "tests"}
    for package in ("mapkg", "studies"):
        ours = {name for name in imports_of(tree_of(module)) if name.split(".")[0] == package}
        assert all(name in MODULES for name in ours), "there is no such module"


def test_no_module_imports_itself_through_others():
    graph = {module: imports_of(tree_of(module)) & set(MODULES) for module in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_what_is_on_top_is_imported_by_the_command_line_alone():
    top = "studies.commands"
    above = {
        module
        for module in MODULES
        if any(name.startswith(top) for name in imports_of(tree_of(module)))
        and not module.startswith(top)
    }
    assert above <= {"studies.__main__"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mapkg.hooks", {"mapkg.hooks"}),
        ("import studies.data as d, torch", {"studies.data.__init__", "torch"}),
        ("from mapkg import hooks, report", {"mapkg.hooks", "mapkg.__init__"}),
        ("from studies.data.molecules import SPLITS", {"studies.data.molecules"}),
        ("def f():\n    if True:\n        from studies import tables", {"studies.tables"}),
    ],
)
def test_imports_are_found_in_every_form(source, expected):
    assert imports_of(ast.parse(source)) == expected


def test_a_relative_import_is_refused():
    with pytest.raises(AssertionError, match="relative import"):
        imports_of(ast.parse("from . import hooks"))


@each_module
def test_a_module_and_all_that_is_public_in_it_have_a_docstring(module):
    def undocumented(node, name):
        if not ast.get_docstring(node):
            yield name
        for child in node.body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(child, kinds) and not child.name.startswith("_"):
                # Functions inside functions are nobody's interface.
                if isinstance(child, ast.ClassDef):
                    yield from undocumented(child, f"{name}.{child.name}")
                elif not ast.get_docstring(child):
                    yield f"{name}.{child.name}"

    assert list(undocumented(tree_of(module), module)) == []


@each_module
def test_a_module_is_short_enough_to_read(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES


@each_module
def test_a_module_is_named_for_what_it_does(module):
    vague = {"util", "utils", "helper", "helpers", "misc", "common", "tools"}
    assert not vague & set(module.split("."))


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("studies.__main__", ("torch", "numpy", "pandas")),
        (
            ", ".join(sorted(name for name in MODULES if name.startswith("mapkg."))),
            ("studies", "rdkit", "sklearn", "networkx", "matplotlib", "captum", "papermill"),
        ),
    ],
    ids=["the command line", "the library"],
)
def test_an_import_brings_only_what_it_needs(imported, heavy):
    # In a process of its own: in this one another test may have imported it.
    code = f"import sys, {imported}; print(*(n for n in {heavy} if n in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_what_the_library_offers_is_imported_when_it_is_asked_for():
    assert len(mapkg.__all__) <= 12
    assert set(mapkg.__all__) <= set(dir(mapkg))
    homes = {name: getattr(mapkg, name).__module__ for name in mapkg.__all__}
    assert set(homes) == set(mapkg.__all__)
    assert homes["report"] == "mapkg.reporting" and homes["scan"] == "mapkg.hooks"
    with pytest.raises(AttributeError, match="'mapkg' has no attribute 'reprot'"):
        mapkg.reprot  # noqa: B018


@each_module
def test_no_docstring_of_a_constant_begins_like_a_type(module):
    # "Sizes: of the split" is read as a type and what it means, and breaks the book.
    body = tree_of(module).body
    for before, after in pairwise(body):
        is_constant = isinstance(before, ast.Assign | ast.AnnAssign)
        if is_constant and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            first = str(after.value.value).splitlines()[0]
            assert ": " not in re.sub(r"``.*?``", "", first), f"line {after.lineno}: {first}"


@each_module
def test_no_docstring_says_what_comes_back_like_a_type(module):
    # Likewise "A row per layer: its norm" under Returns, and the first line of a property.
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node) or ""
        lines = re.findall(r"^(?:Returns|Yields):\n +(.*)$", text, re.MULTILINE)
        if any(getattr(d, "id", "").endswith("property") for d in node.decorator_list):
            lines.append(text.partition("\n")[0])
        for line in lines:
            assert ": " not in re.sub(r"``.*?``", "", f"{line} "), f"{node.name}: {line}"
