"""The shape of the code: folders, import directions, fan-out, and the number of parameters."""

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from trainer.loop import fit

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("trainer", "launch", "regraft")
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
    if path.name != "__init__.py"
}


@cache
def imports(module: str) -> frozenset[str]:
    """Return the project's modules that a module imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return frozenset(found)


@cache
def chain(module: str) -> tuple[str, ...]:
    """Return the longest chain of imports that starts with a module."""
    return (module, *max((chain(other) for other in imports(module)), key=len, default=()))


def test_no_module_imports_itself_over_others() -> None:
    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"imported in a circle: {' -> '.join([*path, module])}"
        for other in imports(module):
            visit(other, (*path, module))

    for module in MODULES:
        visit(module, ())


def test_the_longest_chain_of_imports_has_at_most_10_modules() -> None:
    longest = max((chain(module) for module in MODULES), key=len)
    assert len(longest) <= 10, " -> ".join(longest)


def test_no_module_imports_more_than_15_others() -> None:
    assert {module: len(imports(module)) for module in MODULES if len(imports(module)) > 15} == {}


def test_the_root_of_the_trainer_has_at_most_12_modules() -> None:
    assert len(list((REPOSITORY / "trainer").glob("*.py"))) <= 12


@pytest.mark.parametrize(
    ("package", "others"), [("launch", ("trainer",)), ("trainer", ("launch",)), ("regraft", ("launch",))]
)
def test_trainer_and_launch_never_import_each_other(package: str, others: tuple[str, ...]) -> None:
    for module in MODULES:
        if module.startswith(f"{package}."):
            assert not [name for name in imports(module) if name.split(".")[0] in others], module


@pytest.mark.parametrize("package", ["launch", "regraft"])
def test_the_launcher_starts_without_torch(package: str) -> None:
    for module, path in MODULES.items():
        if module.startswith(f"{package}."):
            assert not {"torch", "torchvision", "accelerate"} & set(_all_imports(path)), module


def test_only_assembly_sees_a_whole_config() -> None:
    """Law 6: everything else takes its own section, or plain arguments."""
    may = {"trainer.main", "trainer.pipeline", "trainer.train_run"}
    for module, path in MODULES.items():
        if module in may or module.startswith(("trainer.config.", "trainer.commands.", "launch.", "regraft.")):
            continue
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        assert not {"Config", "ResolvedConfig"} & names, module


def test_fit_takes_at_most_8_parameters_and_no_constructor_more_than_10() -> None:
    assert len(inspect.signature(fit).parameters) <= 8
    assert {name: count for name, count in _constructors() if count > 10} == {}


def _constructors() -> Iterator[tuple[str, int]]:
    """Yield each class of the packages with the number of parameters of a written `__init__`."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = node.args
                yield f"{module}:{node.lineno}", len(arguments.args + arguments.kwonlyargs) - 1


def _all_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
