"""The two packages: who may import what, and what every module has."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from itertools import pairwise

import pytest
from conftest import REPOSITORY

import mapkg

MAX_LINES = 400
LIBRARY_NEEDS = {"torch", "torch_geometric", "numpy", "scipy", "pandas", "jaxtyping", "tqdm"}
"""What ``mapkg`` may import beside Python's own modules."""

MODULES = {
    path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", "."): path
    for package in ("mapkg", "studies")
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}
"""Files by dotted name, for example ``studies.data.molecules`` or ``studies.data.__init__``."""

TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def module_named(dotted):
    """The module of that name: a file, a folder's ``__init__``, or None."""
    return next((name for name in (dotted, f"{dotted}.__init__") if name in MODULES), None)


def imports_of(module):
    """Modules that a file imports, wherever in the file it does so; ours by their files."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write the full name"
            # "from mapkg import hooks" is an import of mapkg.hooks, not of mapkg's own names.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if module_named(name) else node.module for name in inner}
    return {module_named(name) or name for name in found}


def test_what_a_module_imports_is_below_it():
    graph = {module: imports_of(module) for module in MODULES}
    for module, imported in graph.items():
        packages = {name.partition(".")[0] for name in imported}
        if module.startswith("mapkg."):
            assert packages <= LIBRARY_NEEDS | {"mapkg"} | sys.stdlib_module_names, module
        assert not packages & {"notebooks", "tests"}, module
        ours = {name for name in imported if name.split(".")[0] in ("mapkg", "studies")}
        assert ours <= MODULES.keys(), f"{module} imports what is not there"
        if module != "studies.__main__":
            assert "studies.commands" not in imported, module
    list(TopologicalSorter({m: i & MODULES.keys() for m, i in graph.items()}).static_order())


def test_the_library_brings_only_what_it_needs():
    names = ", ".join(name for name in MODULES if name.startswith("mapkg."))
    heavy = {"studies", "rdkit", "sklearn", "networkx", "matplotlib", "captum", "papermill"}
    code = f"import sys, {names}; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def canonical(distribution):
    return distribution.lower().replace("_", "-")


def test_what_the_studies_import_is_in_the_list_of_dependencies():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + project["optional-dependencies"]["book"]
    listed = {canonical(re.match(r"[\w-]+", each)[0]) for each in listed}
    imported = {name.partition(".")[0] for module in TREES for name in imports_of(module)}
    imported -= {*sys.stdlib_module_names, "mapkg", "studies"}
    by_name = packages_distributions()
    missing = {n for n in imported if listed.isdisjoint(map(canonical, by_name[n]))}
    assert missing == set() and "psutil" in imported


def test_what_the_library_offers_is_imported_when_it_is_asked_for():
    assert len(mapkg.__all__) <= 12
    assert set(mapkg.__all__) <= set(dir(mapkg))
    assert all(getattr(mapkg, name).__module__.startswith("mapkg.") for name in mapkg.__all__)
    with pytest.raises(AttributeError, match="'mapkg' has no attribute 'reprot'"):
        mapkg.reprot  # noqa: B018


DEFINED = ast.FunctionDef | ast.ClassDef


def lines_that_sphinx_may_misread(tree):
    """Lines of docstrings that it takes for a type and what it means if they hold ": "."""
    for before, after in pairwise(tree.body):
        if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            yield str(getattr(after.value, "value", "")).partition("\n")[0]
    for node in ast.walk(tree):
        if isinstance(node, DEFINED):
            text = ast.get_docstring(node) or ""
            yield from re.findall(r"^(?:Returns|Yields):\n +(.*\n?)", text, re.MULTILINE)
            if any(getattr(d, "id", "").endswith("property") for d in node.decorator_list):
                yield text.partition("\n")[0] + "\n"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_and_its_docstrings_are_there_and_read_as_they_are_meant(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES
    assert not {"util", "utils", "helpers", "misc", "common", "tools"} & {*module.split(".")}
    for line in lines_that_sphinx_may_misread(TREES[module]):
        assert not re.search(r":\s", re.sub(r"``.*?``", "", line)), line
    public = [TREES[module], *(n for n in TREES[module].body if isinstance(n, DEFINED))]
    explained = {getattr(n, "name", module) for n in public if ast.get_docstring(n)}
    for each in public:  # a method that another class of the module explains needs no more
        name = getattr(each, "name", module)
        assert name.startswith("_") or name in explained or ast.get_docstring(each), name
        if isinstance(each, ast.ClassDef) and not name.startswith("_"):
            methods = [node for node in each.body if isinstance(node, ast.FunctionDef)]
            explained |= {node.name for node in methods if ast.get_docstring(node)}
            public += methods
