"""The package's picture: who imports whom, and what every module has."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

import mapkg

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "mapkg"
MAX_LINES = 400

EVERYTHING_BELOW = {
    *("configs", "provenance", "files", "hooks", "detection", "data", "models"),
    *("checkpoint", "metrics", "evaluation", "train", "train_nodes", "train_trees"),
}

# What a room may import of the package; a room that is a folder may import from itself.
PICTURE = {
    "configs": set(),
    "provenance": set(),
    "files": set(),
    "hooks": set(),
    "detection": {"hooks"},
    "notebook": set(),
    "data": {"files"},
    "models": {"configs"},
    "checkpoint": {"configs", "files", "models"},
    "metrics": {"configs"},
    "evaluation": {"data", "metrics", "hooks"},
    "train": {"configs", "provenance", "data", "metrics", "hooks", "evaluation", "checkpoint"},
    "train_nodes": {"data", "hooks", "models"},
    "train_trees": {"data", "hooks", "models"},
    "padded_batches": set(),
    "score_measures": set(),
    "stacked_steps": {"configs", "hooks", "models", "padded_batches", "score_measures"},
    "stacked_progress": {
        *("checkpoint", "configs", "models", "padded_batches", "provenance", "score_measures"),
        "stacked_steps",
    },
    "train_stacked": {"configs", "models", "padded_batches", "stacked_progress", "stacked_steps"},
    "observation": {"configs", "data", "models", "hooks", "detection", "evaluation"},
    "attribution": {
        *("configs", "data", "models", "hooks", "detection", "metrics", "evaluation"),
        "observation",
    },
    "attack": {"data", "hooks", "detection", "metrics", "evaluation"},
    "lipschitz": set(),
    "smoothing": {"hooks"},
    "experiments": {
        *EVERYTHING_BELOW,
        "observation",
        "attribution",
        "attack",
        "lipschitz",
        "smoothing",
    },
    "plots": {"configs", "detection"},
    "__init__": set(),  # lazy
    "commands": {
        *EVERYTHING_BELOW,
        *("observation", "attribution", "attack", "experiments", "notebook"),
    },
    "study_commands": {*EVERYTHING_BELOW, "experiments"},
    "__main__": {"configs", "commands", "study_commands"},
}

# The modules of the rooms that are folders.
FOLDERS = {
    "data": {
        *(
            "__init__",
            "bond_properties",
            "description",
            "graph_cache",
            "molecules",
            "neighbours",
            "networks",
            "ogbn_proteins",
        ),
        *(
            "proteins",
            "raw_files",
            "regular",
            "smiles_tables",
            "splitting",
            "tox21",
            "trees",
            "zinc_benchmark",
        ),
    },
    "detection": {"__init__", "laws", "nulls", "ratios", "reporting", "summary"},
    "attribution": {
        *("__init__", "by_type", "edge_scores", "faithfulness", "first_layer", "interventions"),
        "parts",
    },
    "experiments": {
        *(
            "__init__",
            "backward_smoothing",
            "bond_type_tables",
            "bond_types",
            "changed_types",
            "controls",
            "converged",
            "deep_smoothing",
            "depth",
        ),
        *(
            "emergence",
            "explanations",
            "explicit_bias",
            "grid",
            "lipschitz_constants",
            "missing_features",
        ),
        *("remedies", "results", "robustness", "studies", "trees"),
    },
    "plots": {
        *(
            "__init__",
            "attribution",
            "bonds",
            "converged",
            "depth",
            "diagrams",
            "distributions",
            "emergence",
        ),
        "grid",
        *("molecules", "remedies", "smoothing", "style", "trees", "viewer"),
    },
    "models": {
        *("__init__", "deep", "edge_attention", "edge_gat", "full_graph", "laplacian_encoding"),
        *("networks", "norms", "official", "stacked", "standard", "tree_layers", "trees"),
        "vanilla",
    },
}

MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Files of the package by dotted name, for example ``data.molecules`` or ``data.__init__``."""

each_module = pytest.mark.parametrize("module", MODULES)


def tree_of(module):
    return ast.parse(MODULES[module].read_text())


def module_named(dotted):
    """The module that ``mapkg.dotted`` is: a file, a folder's ``__init__``, or None."""
    for candidate in (dotted, f"{dotted}.__init__" if dotted else "__init__"):
        if candidate in MODULES:
            return candidate
    return None


def imports_of(tree):
    """Modules of the package that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            # "from mapkg import hooks" is an import of mapkg.hooks, not of mapkg's own names.
            names = [
                inner if module_named(inner.partition(".")[2]) else node.module
                for inner in (f"{node.module}.{alias.name}" for alias in node.names)
            ]
        else:
            continue
        for name in names:
            package, _, dotted = name.partition(".")
            if package == "mapkg":
                module = module_named(dotted)
                assert module is not None, f"line {node.lineno}: there is no module {name}"
                found.add(module)
    return found


def room_of(module):
    return module.partition(".")[0]


def test_every_file_is_in_the_picture():
    expected = {room for room in PICTURE if room not in FOLDERS}
    expected |= {f"{room}.{module}" for room, modules in FOLDERS.items() for module in modules}
    assert set(MODULES) == expected


@each_module
def test_a_module_imports_only_what_its_room_may(module):
    room = room_of(module)
    allowed = PICTURE[room] | ({room} if room in FOLDERS else set())
    forbidden = {name for name in imports_of(tree_of(module)) if room_of(name) not in allowed}
    assert not forbidden


def test_no_room_of_the_picture_is_below_itself():
    try:
        order = list(TopologicalSorter(PICTURE).static_order())
    except CycleError as error:
        pytest.fail(f"the picture has a circle: {error}")
    assert order[-1] == "__main__" or order[-1] == "__init__"


def test_no_module_imports_itself_through_others():
    graph = {module: imports_of(tree_of(module)) for module in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("top", "only"),
    [
        ("__main__", set()),
        ("commands", {"__main__"}),
        ("study_commands", {"__main__"}),
        ("experiments", {"commands", "study_commands"}),
        ("plots", set()),
    ],
)
def test_what_is_on_top_is_imported_by_the_command_line_alone(top, only):
    imported = {module: set(map(room_of, imports_of(tree_of(module)))) for module in MODULES}
    above = {room_of(module) for module, rooms in imported.items() if top in rooms} - {top}
    assert above == only


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mapkg.hooks", {"hooks"}),
        ("import mapkg.data as d, torch", {"data.__init__"}),
        ("from mapkg import hooks, train", {"hooks", "train"}),
        ("from mapkg import CONFIGS", {"__init__"}),
        ("from mapkg.data import molecules, load", {"data.molecules", "data.__init__"}),
        ("from mapkg.data.molecules import SPLITS", {"data.molecules"}),
        ("def f():\n    if True:\n        from mapkg import plots", {"plots.__init__"}),
        ("import torch\nfrom mapkgs import hooks", set()),
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
        ("mapkg.__main__", ("torch", "numpy", "pandas")),
        ("mapkg.hooks", ("rdkit", "sklearn", "networkx", "matplotlib", "captum", "papermill")),
        ("mapkg.experiments", ("matplotlib", "seaborn", "papermill")),
    ],
)
def test_an_import_brings_only_what_it_needs(imported, heavy):
    # In a process of its own: in this one another test may have imported it.
    code = f"import sys, {imported}; print(*(n for n in {heavy} if n in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_what_the_package_offers_is_imported_when_it_is_asked_for():
    assert {name: getattr(mapkg, name).__module__ for name in ("Config", "build", "load")} == {
        "Config": "mapkg.configs",
        "build": "mapkg.models.networks",
        "load": "mapkg.data",
    }
    assert set(mapkg.__all__) <= set(dir(mapkg))
    with pytest.raises(AttributeError, match="'mapkg' has no attribute 'laod'"):
        mapkg.laod  # noqa: B018


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
