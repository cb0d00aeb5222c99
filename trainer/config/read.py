"""Read a config file: YAML whose mappings have unique keys, of a limited size and depth."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from regraft.files import CONFIGS, read_config_text
from trainer.config.options import SECTIONS, check_option
from trainer.errors import UserError

Content = dict[str, Any]
ANCHORS = "x-"
"""Start of the top-level keys that only hold anchors, as in Docker Compose."""
_MERGE = "tag:yaml.org,2002:merge"
_MAX_VALUES, _MAX_DEPTH = 250_000, 50
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # without libyaml, PyYAML is six times as slow


def read_config_file(path: Path, where: str) -> Content:
    """Return the content of a config file, which may contain some of the options.

    Args:
        path: the file.
        where: its name in error messages.

    Raises:
        UserError: no such file, no YAML, or an unknown or renamed option.

    """
    try:
        content = _parse(read_config_text(path))
    except FileNotFoundError:
        recipes = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise UserError(f"{where}: there is no such file. The recipes in {CONFIGS}: {recipes}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # PyYAML raises all of them
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{where}: not a readable YAML file: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected sections with options, such as 'optim:' and below it '  lr: 0.001'")
    content = {key: value for key, value in content.items() if not str(key).startswith(ANCHORS)}
    for section in SECTIONS:
        if section in content and not isinstance(content[section], dict):
            raise UserError(
                f"{where}: section {section!r} is {str(content[section])[:80]!r}: expected options below it"
            )
    for key, value in options_of(content):
        check_option(key, value, where)
    return content


def options_of(content: Content) -> Iterator[tuple[str, object]]:
    """Yield each option that a config file sets, with its value."""
    for section, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{key}", item) for key, item in value.items())
        else:
            yield str(section), value


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _prepare(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


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
