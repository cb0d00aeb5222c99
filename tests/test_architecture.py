"""The shape of the code: folders, import directions, fan-out, and the number of parameters."""

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from trainer.loop import fit

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for package in ("trainer", "launch", "regraft")
    for path in (REPOSITORY / package).rglob("*.py")
    if path.name != "__init__.py"
}


@cache
def imports(module: str) -> frozenset[str]:
    """Return the project's modules that a module imports."""
    return frozenset(name for name in imported_names(MODULES[module]) if name in MODULES)


def imported_names(path: Path) -> Iterator[str]:
    """Yield every name that a file imports, within functions too: `a`, or for `from a import b` also `a.b`."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


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


def test_sizes() -> None:
    """At most 10 modules in a chain of imports, 15 imported modules per module, 12 modules at the trainer's root."""
    longest = max((chain(module) for module in MODULES), key=len)
    assert len(longest) <= 10, " -> ".join(longest)
    assert {module: len(imports(module)) for module in MODULES if len(imports(module)) > 15} == {}
    assert len(list((REPOSITORY / "trainer").glob("*.py"))) <= 12


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("launch", {"trainer", "torch", "torchvision", "accelerate"}),
        ("trainer", {"launch"}),
        ("regraft", {"launch", "torch", "torchvision", "accelerate"}),
    ],
)
def test_packages_never_import(package: str, others: set[str]) -> None:
    """`trainer` and `launch` do not import each other, and the launcher starts without torch."""
    for module, path in MODULES.items():
        if module.startswith(f"{package}.") and module != "regraft.__main__":  # the command, which starts `launch`
            assert not others & {name.split(".")[0] for name in imported_names(path)}, module


def test_only_assembly_sees_a_whole_config() -> None:
    """Law 6: everything else takes its own section, or plain arguments."""
    may = {"trainer.main", "trainer.pipeline", "trainer.train_run"}
    for module, path in MODULES.items():
        if module in may or module.startswith(("trainer.config.", "trainer.commands.", "launch.", "regraft.")):
            continue
        names = {node.id for node in nodes(path) if isinstance(node, ast.Name)}
        assert not {"Config", "ResolvedConfig"} & names, module


def test_fit_takes_at_most_8_parameters_and_no_constructor_more_than_10() -> None:
    assert len(inspect.signature(fit).parameters) <= 8
    for module, path in MODULES.items():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                assert len(node.args.args + node.args.kwonlyargs) - 1 <= 10, f"{module}:{node.lineno}"
