"""Format text from files and from Slurm, which may contain any characters, for a terminal."""


def escape_unprintable(text: str) -> str:
    r"""Return `text` on one line: a line break becomes `\n`, the start of a terminal's escape sequence `\x1b`."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def escape_lines(text: str) -> str:
    """Return `text` with its line breaks, and with other unprintable characters escaped."""
    return "\n".join(escape_unprintable(line.expandtabs()) for line in text.split("\n"))
