"""What the tests of `lr-find` and `compare` run in each of several processes: `verbs.py FOLDER OPTION...`."""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from trainer.compare import compare
from trainer.lr_find import lr_find
from trainer.main import leave
from trainer.signals import StopSignals

RANGE = ("--from=1e-5", "--to=1e-2", "--steps=10")
TOO_FAR = ("--from=1e-4", "--to=1e4", "--steps=25")
STRATEGIES = "note@optim.lr=1e-5,from-scratch@optim.lr=1e30@optim.warmup=0 steps,head-only@optim.lr=1e-4"


def main() -> None:
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    signals = StopSignals()
    tested = lr_find([*options, f"--run.dir={folder / 'range'}", *RANGE], signals)
    too_far = lr_find([*options, f"--run.dir={folder / 'far'}", *TOO_FAR], signals)
    words = [*options, f"--run.dir={folder / 'compare'}", "--seeds=1", f"--strategies={STRATEGIES}"]
    compared = [compare(words, signals) for _ in range(2)]
    found = {
        "losses": tested.losses,
        "steps": len(too_far.losses),
        "diverged": too_far.diverged,
        "suggested": too_far.suggestion.lr,
        "accuracies": [summaries and [s.accuracy for s in summaries] for summaries in compared],
        "failures": compared[0] and [list(s.failures.values()) for s in compared[0]],
    }
    (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
