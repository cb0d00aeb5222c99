"""The documents of the repository, and the commands and code that they show."""

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
CONFIGS = sorted(REPOSITORY.glob("configs/**/*.yaml"))
DEVELOPER_TOOLS = {
    "python3",
    ".",
    "pip",
    "npm",
    "pytest",
    "pre-commit",
    "ruff",
    "mypy",
    "mkdocs",
    ".ci/run",
    "benchmarks/gpu.sh",
}
"""Programs of installation and development, which `.ci/run` runs; `.` reads a file."""
LANGUAGES = {"", "sh", "python", "py", "yaml", "js", "html"}
"""Languages of fenced blocks: commands are `sh`, and code that a test runs is `python`."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def blocks(document: Path) -> list[tuple[str, str]]:
    """Return language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(document), flags=re.DOTALL | re.MULTILINE)


def prose(document: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", read(document), flags=re.DOTALL | re.MULTILINE)


def inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(document))


def code_blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language; "" stands for blocks without one."""
    return [text for other, text in blocks(document) if other == language]


def commands(document: Path) -> Iterator[list[str]]:
    """Yield the words of each command: of shell blocks, or of the comment at the head of a config."""
    if document.suffix == ".yaml":
        lines = re.findall(r"^#   (.+)", read(document), flags=re.MULTILINE)
    else:
        lines = "\n".join(code_blocks(document, "sh")).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        groups = groupby(words, key=lambda word: word == "&&")
        yield from (list(group) for is_separator, group in groups if not is_separator)


def trainer_options(words: Sequence[str]) -> list[str]:
    """Return the options that the trainer parses, with their values."""
    options = []
    for word, following in pairwise([*words, "--"]):
        if re.match(r"--(config|debug|\w+\.\w+)\b", word):
            has_value = "=" not in word and not following.startswith("--")
            options += [word, following] if has_value else [word]
    return options


def own_options(words: Sequence[str]) -> set[str]:
    """Return the names of the options that are not the trainer's."""
    names = {word.partition("=")[0] for word in words if word.startswith("--")}
    return names - {word.partition("=")[0] for word in trainer_options(words)}
