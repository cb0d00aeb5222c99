"""What is kept of a start must not hold its secrets: names, values, URLs and texts with them taken out.

Rather too much is masked than too little: a `max_tokens = "many"` in a diff is lost, a password is not kept.
"""

import re
from collections.abc import Iterable, Mapping

MASK = "***"

_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|JWT", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^\s/\"'<>]*@")
"""To the last @ before the path: a password may hold one."""
# A diff may hold anything, also a line of a million letters. So a pattern begins only where a run of its characters
# does, and what may follow a keyword is bounded: no text takes more than a time in proportion to its length.
_PEM = re.compile(
    r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----).*?(-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", flags=re.DOTALL
)
_SHAPES = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|"
    r"sk-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
"""Of well-known services' tokens, whatever stands before them."""
_SCHEME = re.compile(r"\b(Bearer[ \t]|Basic[ \t](?=[A-Za-z0-9+/=]{16}))[A-Za-z0-9._~+/=-]{8,}")
# `key` alone is no secret's name in code (`sorted(x, key=...)`): it takes a word before it, or capitals.
_ASSIGNED = re.compile(
    r"""(?P<name>(?<![\w.-])[\w.-]*(?:(?i:token|secret|passw|passphrase|credential|jwt|cookie)|"""
    r"""(?i:(?<![A-Za-z])auth(?![A-Za-z]))|(?i:(?<=[\w-])key)|KEY)"""
    r"""[\w.-]{0,80}["']?[ \t]{0,40}(?::[ \t]{0,40}\w{1,40}[ \t]{0,40})?[:=][ \t]{0,40}"""
    r"""[(\[]?[ \t]{0,40}(?:[rbfu]{0,2}(?=["']))?)"""
    r"""(?P<value>\"{3}[^"]{0,4000}\"{3}|'{3}[^']{0,4000}'{3}|"""
    r""""(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|["'][^\n]*|[^\s"',;()\[\]{}]+)"""
)
_QUOTE = re.compile(r"""\"{3}|'{3}|["']""")
_HARMLESS = re.compile(r"(?:None|True|False|null|true|false|str|int|bool|float|-?\d{1,6}(?:\.\d{1,6})?)")
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")


def is_secret(name: str) -> bool:
    """Return whether a variable or option of this name may hold a secret."""
    return _NAME.search(name) is not None


def masked_text(text: str) -> str:
    """Return a text without passwords in URLs, private keys, tokens, and what is assigned to a secret's name."""
    text = _PEM.sub(rf"\1{MASK}\2", text)
    text = _IN_URL.sub(f"{MASK}@", text)
    text = _SCHEME.sub(rf"\1{MASK}", text)
    text = _SHAPES.sub(MASK, text)
    return _ASSIGNED.sub(_assigned, text)


def _assigned(found: re.Match[str]) -> str:
    value = found["value"]
    if _HARMLESS.fullmatch(value):
        return found[0]
    opening = _QUOTE.match(value)
    quote = opening[0] if opening else ""
    return f"{found['name']}{quote}{MASK}{quote}"


def masked_words(words: Iterable[str]) -> list[str]:
    """Return a command line with its secrets masked: `--token x`, `--token=x`, `TOKEN=x`, URLs."""
    masked: list[str] = []
    follows = False
    for word in words:
        name, equals, _ = word.partition("=")
        if follows and not (word.startswith("--") and len(word) > 2):
            masked.append(MASK)
            follows = False
            continue
        secret = is_secret(name) and (bool(equals) or _OPTION.fullmatch(word) is not None)
        follows = secret and not equals
        masked.append(f"{name}={MASK}" if secret and equals else masked_text(word))
    return masked


def masked_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return variables of an environment by name, the secret ones masked."""
    return {name: MASK if is_secret(name) else masked_text(variables[name]) for name in sorted(variables)}
