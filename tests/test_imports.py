"""The shape of the package: imports run one way and stay lean, modules stay short, recipes stay data."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import lightning_int8

PACKAGE = Path(lightning_int8.__file__).parent
KERNELS = PACKAGE.parent / "kernels"  # part of the package once installed, beside it in the repository
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])

ORDER = (
    {"version", "generator"},
    {"numerics", "grids"},
    {"measures", "cpu_magnitudes", "magnitudes"},
    {"ranges"},
    {"policies"},
    {"spec"},
    {"recipe_mapping"},
    {"geometry", "backends", "recipes", "kernels"},
    {"fusion"},
    {"layer_call", "layer_times"},
    {"clock", "bit_width", "operand"},
    {"planes"},
    {"contraction", "sync"},
    {"layers", "comparison"},
    {"report", "steering"},
    {"settings"},
    {"norm", "optim"},
    {"eligibility"},
    {"rewrite"},
    {"checkpoint"},
    {"engine"},
    {"hosts"},
    {"precision", "fabric"},
    {"callbacks"},
    {"lightning_int8"},  # the public names
    {"vision"},
    {"cli"},
)
"""Modules and folders of the package from the bottom up. A module imports from its own row or from rows above it; a new
module takes its place here."""

LATE = {"lightning", "pytorch_lightning", "torchmetrics", "cupy", "numba", "torchvision", "transformers", "matplotlib"}
"""What `import lightning_int8` must not import."""

MAY_IMPORT_LATE = {
    "numba": {"backends", "cpu_magnitudes"},
    "lightning": {"precision", "fabric", "callbacks", "vision", "cli"},
}
"""Where such a package may be named at the top of a module; ``torchmetrics`` goes with lightning."""

MEDIAN_LINES, MOST_LINES = 150, 300


def dotted(path):
    """Name of a module inside the package: "backends.base"; "lightning_int8" for the package itself."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else KERNELS.parent).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "lightning_int8"


MODULES = {dotted(p): ast.parse(p.read_text()) for p in SOURCES}


def row(module):
    place = module.partition(".")[0]
    return next((i for i, names in enumerate(ORDER) if place in names), -1)


def own_imports(tree):
    """Modules of the package that a module imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("lightning_int8."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            base, _, module = node.module.partition(".")
            if base == "lightning_int8":
                for alias in node.names:
                    full = f"{module}.{alias.name}".lstrip(".")
                    yield full if full in MODULES else module or "lightning_int8"


def foreign_imports(tree):
    """Packages that are imported with the module, not by a function when it is called."""
    nodes = [n for statement in tree.body if not isinstance(statement, ast.FunctionDef) for n in ast.walk(statement)]
    late = {n for f in nodes if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in nodes:
        if node in late:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_every_module_has_its_place_in_the_order():
    assert [m for m in MODULES if row(m) < 0] == []


def test_imports_run_one_way():
    upward = [f"{m} imports {other}" for m, t in MODULES.items() for other in own_imports(t) if row(other) > row(m)]
    assert upward == []


def test_imports_have_no_cycle():
    # A package and its own modules may name each other: the folder's list finds its files.
    graph = {m: {o for o in own_imports(t) if o != m and not m.startswith(f"{o}.")} for m, t in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_walk_sees_imports_wherever_they_are():
    source = """
import lightning_int8.cli
from lightning_int8 import Recipe, ranges
from lightning_int8.spec import Recipe
def f():
    from lightning_int8.ranges.absmax import Rule
    import cupy
"""
    tree = ast.parse(source)
    assert sorted(own_imports(tree)) == ["cli", "lightning_int8", "ranges", "ranges.absmax", "spec"]
    assert set(foreign_imports(tree)) == {"lightning_int8"}
    with pytest.raises(AssertionError, match="relative import in line 1"):
        list(own_imports(ast.parse("from . import spec")))


def test_heavy_packages_are_imported_late():
    named = {
        (m, package)
        for m, tree in MODULES.items()
        for package in foreign_imports(tree)
        if package in LATE
        and m.partition(".")[0] not in MAY_IMPORT_LATE.get(package.replace("torchmetrics", "lightning"), ())
    }
    assert named == set()


def test_importing_the_package_is_lean():
    code = "import sys, lightning_int8; print(*{m.partition('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    loaded = set(run.stdout.split())
    assert {"torch", "lightning_int8"} <= loaded
    assert LATE & loaded == set()


def test_public_names_are_there():
    for name in lightning_int8.__all__:
        assert getattr(lightning_int8, name) is not None
    assert sorted(lightning_int8.__all__) == lightning_int8.__all__
    with pytest.raises(AttributeError, match="module 'lightning_int8' has no attribute 'Int9Precision'"):
        lightning_int8.Int9Precision  # noqa: B018


def test_modules_are_short():
    lines = {dotted(p): len(p.read_text().splitlines()) for p in SOURCES}
    assert median(lines.values()) <= MEDIAN_LINES
    assert {m: n for m, n in lines.items() if n > MOST_LINES} == {}


def test_no_module_is_a_drawer_for_anything():
    assert [m for m in MODULES if {"utils", "util", "helpers", "common", "misc"} & set(m.split("."))] == []


def recipe_comparisons(tree):
    """Lines that ask which recipe it is, instead of reading what the recipe says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = [s for s in sides if isinstance(s, ast.Constant) and isinstance(s.value, str)]
            names = [s for s in sides if isinstance(s, ast.Name | ast.Attribute) and "recipe" in ast.unparse(s)]
            if names and (texts or any(isinstance(s, ast.Tuple | ast.List | ast.Set) for s in sides)):
                yield node.lineno
        elif isinstance(node, ast.Match) and "recipe" in ast.unparse(node.subject):
            yield node.lineno


def test_no_code_asks_which_recipe_it_is():
    assert [(m, line) for m, tree in MODULES.items() for line in recipe_comparisons(tree)] == []


@pytest.mark.parametrize(
    "source",
    [
        "recipe == 'unified'",
        "'unified' != self.recipe.name",
        "recipe.name in ('a', 'b')",
        "match recipe.name:\n case 'a': 1",
    ],
)
def test_such_a_question_would_be_found(source):
    assert list(recipe_comparisons(ast.parse(source))) == [1]
