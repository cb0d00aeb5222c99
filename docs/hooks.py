"""Hooks of MkDocs: the option reference of configuration.md, and pages and files that lie outside docs/."""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from trainer.config.help import OptionHelp, describe_sections  # noqa: E402

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmark-results.md",
}
"""Documents outside docs/ -> their pages."""
OPTIONS_MARKER = "<!-- options -->"
"""Line of configuration.md that the options replace."""
NOT_EXPLAINED_IN = {"configuration.md", "measurements.md", "comparison.md", "architecture.md"}
"""Pages that mention options and do not explain them."""
MAX_EXPLANATIONS = 3

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
_FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the documents outside docs/, and the job scripts and configs that pages link to."""
    others = {
        path.relative_to(REPOSITORY).as_posix(): path.relative_to(REPOSITORY).as_posix()
        for pattern in ("slurm/*.sh", "configs/**/*.yaml")
        for path in REPOSITORY.glob(pattern)
    }
    for source, target in (PAGES | others).items():
        files.append(File.generated(config, target, abs_src_path=str(REPOSITORY / source)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its options, and with links to the pages of the site."""
    uri = page.file.src_uri
    if uri == "configuration.md":
        markdown = markdown.replace(OPTIONS_MARKER, options_markdown(Path(config.docs_dir)))
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(uri, f"docs/{uri}")
    return _LINK.sub(lambda link: _site_link(link, source), markdown)


def _site_link(link: re.Match[str], source: str) -> str:
    """Return a link of a document of the repository as a link of its page."""
    before, target, anchor, after = link.groups(default="")
    if "://" in target:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return f"{before}{PAGES.get(path, path.removeprefix('docs/'))}{anchor}{after}"


def options_markdown(docs: Path) -> str:
    """Return the sections of the config with their options, and links to the pages that explain them."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted(docs.glob("*.md"))}
    lines: list[str] = []
    for section in describe_sections():
        lines += [f"## {section.name or 'General'}", "", section.description, ""]
        for option in section.options:
            lines += _option(option, pages)
    return "\n".join(lines)


def _option(option: OptionHelp, pages: dict[str, str]) -> Iterator[str]:
    yield from (f"### `{option.name}` {{ #{option.name} }}", "")
    yield from (f"{option.description}", "")
    yield f"- Type: `{option.type}`"
    yield f"- Default: `{option.default}`"
    if links := list(_explanations(option.name, pages)):
        yield f"- See: {', '.join(links)}"
    yield ""


def _explanations(option: str, pages: dict[str, str]) -> Iterator[str]:
    """Yield links to the pages that mention an option most often, at the heading of the first mention."""
    mention = re.compile(rf"`(?:--)?{re.escape(option)}\b(?!\.)")
    counts = {name: len(mention.findall(_FENCED.sub("", text))) for name, text in pages.items()}
    best = sorted(
        (name for name in counts if counts[name] and name not in NOT_EXPLAINED_IN), key=lambda name: -counts[name]
    )
    for name in best[:MAX_EXPLANATIONS]:
        text = _FENCED.sub("", pages[name])
        first = mention.search(text)
        headings = re.findall(r"^(#+) (.+)$", text[: first.start() if first else 0], flags=re.MULTILINE)
        title = headings[0][1]
        level, heading = headings[-1]
        anchor = "" if level == "#" else f"#{slugify(heading.replace('`', ''), '-')}"
        yield f"[{title.replace('`', '')}]({name}{anchor})"
