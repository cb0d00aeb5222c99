import os

import pytest


@pytest.fixture(autouse=True)
def _fast_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush nothing to the disk: no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
