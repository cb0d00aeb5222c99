"""The command `regraft`, which is also `python -m regraft`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]

from regraft.startup_signals import exit_on_signals


def main() -> int:
    """Run the verb on the command line, and return the exit code."""
    exit_on_signals()
    from regraft.search_path import protect_imports  # noqa: PLC0415 (only after `exit_on_signals`)

    protect_imports()
    from launch.cli import main as run  # noqa: PLC0415 (only after `protect_imports`)

    return run()


if __name__ == "__main__":
    sys.exit(main())
