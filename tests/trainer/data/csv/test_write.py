import csv
import io
import os
import random
from pathlib import Path

import pytest

from trainer.data.csv import write
from trainer.data.csv.write import write_table


@pytest.mark.parametrize("part", [1, 7, 10_000])
def test_table_equals_that_of_the_csv_module(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_ROWS", part)
    random_ = random.Random(part)
    alphabet = ["a", "/", '"', ",", "\n", "\r", " ", "é", os.fsdecode(b"\xff"), "'", ";"]
    for hostile in (False, True):
        names = ["".join(random_.choices(alphabet if hostile else alphabet[:2], k=9)).strip("/") for _ in range(60)]
        rows = [(f"{random_.choice((tmp_path, '/else/where'))}/{name}", name, "train") for name in names]
        write_table(tmp_path / "split.csv", rows)
        expected = io.StringIO()
        writer = csv.writer(expected, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        writer.writerows((path.removeprefix(f"{tmp_path}/"), *others) for path, *others in rows)
        with (tmp_path / "split.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            assert file.read() == expected.getvalue()
