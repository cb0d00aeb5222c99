import dataclasses
import re

import pytest

from trainer.config.help import field_docstrings
from trainer.config.options import OPTIONS
from trainer.config.parse import parse
from trainer.config.schema import Config

SECTIONS = {field.name: type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)}
DESCRIPTIONS = {
    f"{section}.{name}": text
    for section, config_class in SECTIONS.items()
    if dataclasses.is_dataclass(config_class)
    for name, text in field_docstrings(config_class).items()
} | field_docstrings(Config)


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("REGRAFT_COMMAND", "regraft debug")
    with pytest.raises(SystemExit) as exit_:
        parse(["--config", "nowhere.yaml", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    # A title stands on one line, whatever the width.
    assert all(len(line) <= 80 or line.startswith("  --") for line in text.splitlines())
    return text


def test_help_lists_every_option_with_description_and_default(help_text: str) -> None:
    assert set(DESCRIPTIONS) == OPTIONS
    flat = " ".join(help_text.split())
    for option, description in DESCRIPTIONS.items():
        assert re.search(rf"--{re.escape(option)} \S.* \[default: \S.*\] {re.escape(description)}", flat), option
    assert "--run.resume auto|never|must [default: auto]" in help_text
    assert "--optim.max_grad_norm FLOAT|null [default: null]" in help_text
    assert "--data.crop_scale [FLOAT, FLOAT] [default: [0.08, 1.0]]" in help_text


def test_help_groups_options_by_section(help_text: str) -> None:
    headings = re.findall(r"^(\w+): .*\.$", help_text, flags=re.MULTILINE)
    assert headings == [name for name in SECTIONS if name != "debug"]
    for section in headings:
        block = help_text.partition(f"\n{section}: ")[2].partition("\n\n")[0]
        assert re.findall(r"^  --(\w+)\.", block, flags=re.MULTILINE) == [section] * block.count("\n  --")


def test_help_of_one_section_and_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_COMMAND", "regraft debug")
    for words in (["--help", "optim"], ["x", "-h", "optim"]):
        with pytest.raises(SystemExit):
            parse(words)
        text = capsys.readouterr().out
        assert text.startswith("usage: regraft debug [FOLDER] [--config FILE]")
        assert set(re.findall(r"^  --(\S+)", text, flags=re.MULTILINE)) == {
            o for o in OPTIONS if o.startswith("optim.")
        }
    with pytest.raises(SystemExit):
        parse(["--version"])
    assert re.fullmatch(r"regraft \S+\n", capsys.readouterr().out)


def test_descriptions_are_one_short_sentence() -> None:
    for option, description in DESCRIPTIONS.items():
        assert re.fullmatch(r"[A-Z]((?!\. ).)*\.", description), option
        assert len(description.split()) <= 25, option
