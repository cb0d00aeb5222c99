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
MAX_EXPLANATIONS = 2

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
_ANY_OPTION = re.compile(r"`(?:--)?\w+\.\w+|`--debug")
_PATH = re.compile(r"<code>([\w./-]+/[\w./-]+)</code>")
_CODE = re.compile(r"(?<!<pre>)<code>[^<]*</code>")
_OPTION = re.compile(r"--[\w.-]{1,28}")
_FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the documents outside docs/, and the job scripts and configs that pages link to."""
    patterns = ("slurm/*.sh", "configs/**/*.yaml")
    others = [path.relative_to(REPOSITORY).as_posix() for pattern in patterns for path in REPOSITORY.glob(pattern)]
    for source, target in (PAGES | {path: path for path in others}).items():
        files.append(File.generated(config, target, abs_src_path=str(REPOSITORY / source)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its options, and with links to the pages of the site."""
    uri = page.file.src_uri
    if uri == "configuration.md":
        markdown = markdown.replace(OPTIONS_MARKER, options_markdown(Path(config.docs_dir)))
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(uri, f"docs/{uri}")
    return _LINK.sub(lambda link: _site_link(link, source), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let paths in inline code break after a slash, so that a table holds them, and no option at a hyphen."""
    html = _CODE.sub(lambda code: _OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html)
    return _PATH.sub(lambda code: f"<code>{code[1].replace('/', '/<wbr>')}</code>", html)


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
    """Yield links to the sections that explain an option best: a heading, or the first words of a row or an item."""
    mention = re.compile(rf"`(?:--)?{re.escape(option)}\b(?!\.)")
    found: list[tuple[float, str]] = []
    for name, text in pages.items():
        title = anchor = ""
        scores: dict[str, float] = {}
        for line in _FENCED.sub("", text).splitlines() if name not in NOT_EXPLAINED_IN else ():
            heading = re.match(r"(#+) (.+)", line)
            if heading:
                title = title or heading[2].replace("`", "")
                anchor = "" if heading[1] == "#" else f"#{slugify(heading[2].replace('`', ''), '-')}"
            if mention.search(line) and anchor not in ("#tests", "#measurements"):
                weight = 6 if heading else 4 if mention.match(line.lstrip("|-* ")) else 1
                # A line that lists many options explains none of them.
                scores[anchor] = scores.get(anchor, 0) + weight / len(_ANY_OPTION.findall(line))
        if scores:
            best = max(scores, key=lambda key: scores[key])
            found.append((scores[best], f"[{title}]({name}{best})"))
    found.sort(key=lambda entry: -entry[0])
    yield from (link for score, link in found[:MAX_EXPLANATIONS] if 2 * score >= found[0][0])
