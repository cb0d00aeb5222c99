from pathlib import Path

import pytest

from launch.errors import LaunchError
from launch.slurm.site import Site, load_site, read_site

COMPLETE = """\
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


def test_all_settings_are_read(file: Path) -> None:
    for text in ("", "# nothing yet\n", "partition:\n"):
        file.write_text(text)
        assert read_site(file) == Site()
    file.write_text(COMPLETE)
    texts = {"partition": "gpu", "account": "12345", "qos": "normal", "nccl_interface": "ib0", "stage": "$TMPDIR"}
    env = (("NCCL_DEBUG", "WARN"), ("RETRIES", "3"))
    assert read_site(file) == Site(**texts, modules=("cuda/12.8", "gcc"), activate=("/opt/venv",), env=env)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", r"there is no setting 'partitoin'\. Did you mean partition\? Valid: partition, account"),
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
def test_invalid_file_is_reported_with_its_path(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(LaunchError, match=message) as raised:
        read_site(file)
    assert str(file) in str(raised.value)


def test_given_file_overrides_variable_and_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".config" / "regraft" / "site.yaml"
    variable, given = tmp_path / "variable.yaml", tmp_path / "given.yaml"
    default.parent.mkdir(parents=True)
    environment = {"REGRAFT_SITE": str(variable)}
    assert load_site(None, {}) == Site()
    for file, variables in ((str(given), {}), (None, environment)):
        with pytest.raises(LaunchError, match="cannot be read"):
            load_site(file, variables)
    for path in (default, variable, given):
        path.write_text(f"partition: {path.stem}")
    assert load_site(None, {}).partition == "site"
    assert load_site(None, environment).partition == "variable"
    assert load_site(str(given), environment).partition == "given"
