"""The house stands: imports point down, light modules stay light, the loop stays readable."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_finetune"

# From the ground up. A module may import its own layer and those below; the longest matching name counts.
LAYERS: list[tuple[str, set[str]]] = [
    ("ground: errors, the base of all specs", {"durable", "errors", "host", "spec"}),
    (
        "specs: what a part is told, and tables of names",
        {"augment.spec", "data.spec", "data.labels", "features.disk", "features.spec", "hub.spec", "models.spec", "models.anatomy", "monitor", "optim", "schedule",
         "shipped", "strategies", "tasks"},
    ),
    (
        "parts: each knows its own spec, none knows the recipe",
        {"augment", "data", "deepspeed", "models", "tasks.loss", "emissions", "evaluation", "features", "freeze", "fetch", "heap", "linear", "memory", "pace", "parallel", "progress", "report", "runfolder"},
    ),
    (
        "recipe: the specs composed, read, checked and written",
        {"checks", "foreign_names", "recipe", "recipe_errors", "recipe_layers", "recipe_schema", "recipe_spec",
         "yaml_source"},
    ),
    ("plan: a recipe on one backbone, one data set, one machine", {"compilation", "defaults", "precision", "timeline", "setup", "solvable"}),
    (
        "run: the loop and what it leaves behind",
        {"checkpoint", "features.feed", "forecast", "hub", "position", "record", "resume", "runlock", "solve", "stopping", "together", "train", "trained"},
    ),
    ("entries: what people call", {"", "__main__", "cli", "compare", "explain", "export", "inference"}),
]  # fmt: skip

HEAVY = [
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "datasets",
    "accelerate",
    "peft",
    "evaluate",
    "sklearn",
    "matplotlib",
]

# `--help`, `check` and `recipes` load these and no more.
LIGHT = [
    "", "cli", "errors", "host", "spec", "monitor", "schedule", "optim", "runfolder", "timeline", "defaults",
    "recipe", "recipe_spec", "recipe_schema", "recipe_errors", "yaml_source", "checks",
    "augment.spec", "augment.presets", "features.disk", "features.spec", "fetch", "hub.fresh", "hub.spec", "hub.reader", "data.spec", "data.labels", "data.report", "models.spec", "models.anatomy",
    "shipped", "strategies", "tasks", "tasks.metrics",
]  # fmt: skip


def module_name(path: Path) -> str:
    """Return the module in `path` by its name inside the package, "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, *, inside_functions: bool) -> Iterator[str]:
    """Yield the package's modules that `module` imports, at its top level or inside functions."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and in_function == inside_functions:
                assert child.level == 0, f"{module}: relative import"
                if (child.module or "").split(".")[0] == "hf_finetune":
                    base = (child.module or "").removeprefix("hf_finetune").lstrip(".")
                    for alias in child.names:
                        whole = f"{base}.{alias.name}".lstrip(".")
                        yield whole if whole in SOURCES else base
            elif isinstance(child, ast.Import) and in_function == inside_functions:
                for alias in child.names:
                    if alias.name.split(".")[0] == "hf_finetune":
                        yield alias.name.removeprefix("hf_finetune").lstrip(".")
            inner = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, inner)

    yield from visit(ast.parse(SOURCES[module].read_text(encoding="utf-8")), False)


def layer(module: str) -> int:
    """Return how high a module stands."""
    found = [
        (len(name), height)
        for height, (_, names) in enumerate(LAYERS)
        for name in names
        if module == name or (name and module.startswith(f"{name}."))
    ]
    assert found, f"hf_finetune.{module} stands in no layer: add it to LAYERS, and to docs/architecture.md"
    return max(found)[1]


@pytest.mark.parametrize("inside_functions", [False, True], ids=["top level", "inside functions"])
def test_imports_point_down(inside_functions: bool) -> None:
    upward = [
        f"{module} ({LAYERS[layer(module)][0]}) imports {imported} ({LAYERS[layer(imported)][0]})"
        for module in SOURCES
        if module != ""  # the package's own names are lazy
        for imported in imports(module, inside_functions=inside_functions)
        if layer(imported) > layer(module)
    ]
    assert not upward, "\n".join(upward)


def test_nothing_imports_an_entry() -> None:
    entries = LAYERS[-1][1]
    callers = {
        (module, imported)
        for module in SOURCES
        for late in (False, True)
        for imported in imports(module, inside_functions=late)
        if imported in entries and module not in {"__main__", "cli", imported}
    }
    assert not callers


def test_no_import_cycles() -> None:
    graph = {
        module: {i for late in (False, True) for i in imports(module, inside_functions=late) if i}
        for module in SOURCES
    }
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            raise AssertionError("import cycle: " + " -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            for imported in sorted(graph[module]):
                walk(imported, [*path, module])
            done.add(module)

    for module in graph:
        walk(module, [])


def test_layers_name_modules_that_exist() -> None:
    named = {name for _, names in LAYERS for name in names}
    assert named <= set(SOURCES)


def test_light_modules_load_nothing_heavy() -> None:
    lines = ["import sys, importlib", f"heavy = {HEAVY!r}"]
    for module in LIGHT:
        name = f"hf_finetune.{module}".rstrip(".")
        lines.append(f"importlib.import_module({name!r})")
        lines.append(f"found = sorted(set(heavy) & set(sys.modules)); assert not found, ({name!r}, found)")
    lines.append("from hf_finetune.recipe import load_recipe, shipped_recipes")
    lines.append("[load_recipe(name) for name in shipped_recipes()]")
    lines.append("found = sorted(set(heavy) & set(sys.modules)); assert not found, ('load_recipe', found)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes"], ["check", "frozen"]])
def test_light_verbs_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom hf_finetune.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"found = sorted(set({HEAVY!r}) & set(sys.modules)); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_is_called_utils_or_like_a_dependency() -> None:
    distributions = {dependency.split("[")[0].lower() for dependency in dependencies()}
    imported_as = {name.lower() for name, homes in importlib.metadata.packages_distributions().items()
                   if {home.lower().replace("-", "_") for home in homes} & distributions}  # fmt: skip
    taken = (
        distributions
        | imported_as
        | {"utils", "util", "helpers", "common", "misc"}
        | set(sys.stdlib_module_names)
    )
    ours = {name.rsplit(".", 1)[-1] for name in SOURCES if name}
    assert not ours & taken


def dependencies() -> set[str]:
    """Return the names of what the package stands on, as importable names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("]")[0]
    found = {line.strip().strip('",').split(">=")[0].lower().replace("-", "_") for line in block.splitlines()}
    return found - {""}


def test_dependencies_are_read() -> None:
    assert {"torch", "timm", "transformers", "pydantic"} <= dependencies()


def test_the_loop_can_be_read_in_one_go() -> None:
    assert len(SOURCES["train"].read_text(encoding="utf-8").splitlines()) < 300


@pytest.mark.parametrize("module", SOURCES)
def test_no_print_and_nothing_left_to_do(module: str) -> None:
    text = SOURCES[module].read_text(encoding="utf-8")
    called = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = [(node.func.id, node.lineno) for node in called if isinstance(node.func, ast.Name)]
    calls = [line for name, line in names if name in {"print", "breakpoint"}]
    notes = [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and any(word in token.string for word in ("TODO", "FIXME", "XXX"))
    ]
    assert not calls + notes


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name
        for name, path in SOURCES.items()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent
