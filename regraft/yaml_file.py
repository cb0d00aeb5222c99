"""Load a YAML file of options safely: of limited size and depth, with unique keys, whatever it contains."""

import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ERRORS = (OSError, ValueError, RecursionError, yaml.YAMLError)
"""What `load` raises for a file that is not a readable YAML file."""
_INT = "tag:yaml.org,2002:int"
_MERGE = "tag:yaml.org,2002:merge"
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1_000_000, 250_000, 50
_TAB = re.compile(r"^ *\t\s*[\w-]+:(\s|$)", re.MULTILINE)
_OCTAL = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")
"""Whole numbers that YAML 1.1 reads in another base: `0755` and `1:30`."""
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # without libyaml, PyYAML is six times as slow


def load(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        OSError: there is no such file, or it is not readable.
        ValueError: it is not a regular file, not UTF-8 or too large, it has duplicate keys, or too many or deep values.
        yaml.YAMLError, RecursionError: it is not YAML.

    """
    loader = _Loader(_read(path))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _prepare(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each option of a config under its dotted name, as `optim.lr`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path) -> str:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe or a device might never end
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ValueError(f"it is {kind}: expected a YAML file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES / 1e6:g} MB: expected a YAML file of options")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8: save the file in UTF-8") from None
    if tab := _TAB.search(text):
        raise ValueError(f"line {text[: tab.start()].count(chr(10)) + 1} is indented with a tab: use spaces")
    return text


def _prepare(root: yaml.Node) -> None:
    """Check a document, and resolve its merge keys.

    An alias counts as much as its anchor: nine lines of aliases to aliases stand for a billion values.

    Raises:
        ValueError: duplicate keys, of which PyYAML silently takes the last, or too many or too deep values.

    """
    sizes: dict[yaml.Node, int] = {}
    open_nodes: set[yaml.Node] = set()
    merged = 0

    def visit(node: yaml.Node, depth: int) -> int:
        nonlocal merged
        where = f"line {node.start_mark.line + 1}"
        if node in open_nodes or depth > _MAX_DEPTH:
            raise ValueError(f"{where}: values are nested deeper than {_MAX_DEPTH} levels")
        if node not in sizes:
            open_nodes.add(node)
            sizes[node] = 1 + sum(visit(child, depth + 1) for child in _children(node))
            open_nodes.remove(node)
            if isinstance(node, yaml.MappingNode):
                _resolve_merge_keys(node)
                merged += len(node.value)
        if max(sizes[node], merged) > _MAX_VALUES:
            raise ValueError(f"{where}: more than {_MAX_VALUES:,} values, aliases included")
        return sizes[node]

    visit(root, 0)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        keys = Counter(str(key.value) for key, _ in node.value)
        if duplicates := sorted(key for key, count in keys.items() if count > 1):
            raise ValueError(f"line {node.start_mark.line + 1}: duplicate keys: {', '.join(duplicates[:5])}")
        return [child for pair in node.value for child in pair]
    if node.tag == _INT and _OCTAL.fullmatch(str(node.value)):
        raise ValueError(
            f"line {node.start_mark.line + 1}: {node.value} is a number of another base in YAML: write it "
            "without leading zeros and colons, or in quotes"
        )
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _resolve_merge_keys(node: yaml.MappingNode) -> None:
    """Replace `<<` by the pairs that it adds; the node's own keys win, then the first of several mappings.

    PyYAML's order of several mappings differs from version to version. It reports merge keys of other values.
    """
    merged = [value for key, value in node.value if key.tag == _MERGE]
    sources = [node for value in merged for node in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
    if not all(isinstance(source, yaml.MappingNode) for source in sources):
        return
    pairs = {str(key.value): (key, value) for key, value in node.value if key.tag != _MERGE}
    for source in sources:
        for key, value in source.value:
            pairs.setdefault(str(key.value), (key, value))
    node.value = list(pairs.values())
