from pathlib import Path

import pytest

from launch.errors import LaunchError
from launch.slurm.site import Site, find, read

WHOLE = """\
partition: gpu
account: 12345
qos: normal
modules: [cuda/12.8, gcc]
activate: /opt/venv
nccl_interface: ib0
stage: $TMPDIR
env:
  NCCL_DEBUG: WARN
  RETRIES: 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "site.yaml"


def test_every_setting_is_read(file: Path) -> None:
    file.write_text(WHOLE)
    assert read(file) == Site(
        partition="gpu",
        account="12345",
        qos="normal",
        modules=("cuda/12.8", "gcc"),
        activate=("/opt/venv",),
        nccl_interface="ib0",
        stage="$TMPDIR",
        env=(("NCCL_DEBUG", "WARN"), ("RETRIES", "3")),
    )


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "partition:\n"])
def test_what_is_left_empty_is_not_set(text: str, file: Path) -> None:
    file.write_text(text)
    assert read(file) == Site()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "partitoin: gpu",
            r"there is no setting 'partitoin'\. Did you mean partition\? Valid: partition, account",
        ),
        ("1: gpu", "there is no setting 1"),
        ("[partition]", "expected settings"),
        ("partition: [a, b]", "partition is"),
        ("account: true", "quote it"),
        ("qos: ''", "not empty"),
        ('partition: "a\\nb"', "one line"),
        ("modules: [a, [b]]", "modules is"),
        ("env: NCCL_DEBUG", "names with values"),
        ("env: {'A B': x}", "name of a variable"),
        ("env: {'A=$(touch x); B': x}", "name of a variable"),
        ("env: {A: {B: c}}", r"env\.A is"),
        ("partition: 'a", "cannot be read"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, words: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(LaunchError, match=words) as raised:
        read(file)
    assert str(file) in str(raised.value)


def test_a_file_that_was_named_has_to_be_there(file: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be read"):
        find(str(file), {})
    with pytest.raises(LaunchError, match="cannot be read"):
        find(None, {"REGRAFT_SITE": str(file)})


def test_the_nearest_file_counts(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(None, {}) == Site()
    own = tmp_path / ".config" / "regraft" / "site.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("partition: own")
    assert find(None, {}).partition == "own"
    file.write_text("partition: of the variable")
    assert find(None, {"REGRAFT_SITE": str(file)}).partition == "of the variable"
    given = tmp_path / "given.yaml"
    given.write_text("partition: given")
    assert find(str(given), {"REGRAFT_SITE": str(file)}).partition == "given"
