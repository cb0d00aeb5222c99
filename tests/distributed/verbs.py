"""Run `lr-find` and `compare` in each of several processes, for test_verbs.py: `verbs.py FOLDER OPTION...`."""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from tests.distributed.test_verbs import tried
from trainer.main import exit_process


def main() -> None:
    folder = Path(sys.argv[1])
    found = tried(folder, sys.argv[2:])
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    exit_process(0)


if __name__ == "__main__":
    main()
