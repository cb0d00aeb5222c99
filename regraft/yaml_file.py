"""Load a YAML file of options safely: of limited size and depth, with unique keys, whatever it contains."""

import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

ERRORS = (OSError, ValueError, RecursionError, yaml.YAMLError)
"""What `load` raises for a file that is not a readable YAML file."""
_MERGE = "tag:yaml.org,2002:merge"
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1_000_000, 250_000, 50
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


def _read(path: Path) -> str:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe or a device might never end
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ValueError(f"it is {kind}: expected a YAML file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES / 1e6:g} MB: expected a YAML file of options")
    return content.decode("utf-8")


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
