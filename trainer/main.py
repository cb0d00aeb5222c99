"""Fine-tune a pretrained image classifier: `accelerate launch trainer/main.py [--config FILE] [--section.key VALUE]`.

How a run is assembled, in the order in which it happens:

parse                      config/parse.py: command line and YAML -> Config
run                        pipeline.py: pretraining, fine-tuning, baseline
  resolve, init_distributed  config/resolve.py, distributed/context.py: paths, processes, device, precision
  open_run                   run/session.py: the run folder, its lock, requests to stop
  train_run                  train_run.py: one phase
    data                       config/build_data.py -> data/
    resume                     checkpoint/resume.py
    model, optimizer           config/build_model.py -> model/, transfer/, optim/
    state                      state.py: what is updated, saved and restored
    fit                        loop.py -> optim/train_step.py, evaluate.py, checkpoint/manager.py
    report                     report/
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]
    from regraft.search_path import protect_imports

    protect_imports()

import gc
from collections.abc import Callable, Sequence
from functools import partial

from trainer.cli import exit_after, run_cli
from trainer.config.parse import parse
from trainer.distributed.signals import StopSignals
from trainer.run.garbage_collector import without_gc


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code: 0, 2 for what the user can fix, 75 for a stop, 130 for a second Ctrl-C."""

    def train(signals: StopSignals) -> None:
        config = parse(sys.argv[1:] if argv is None else argv)
        # torch takes seconds to import: a wrong option is reported without it. Signals are deferred, since an
        # interrupted import would leave half a module behind.
        work: Callable[[], object]
        with signals.deferred(), without_gc():
            if config.debug:
                from trainer.commands.debug import debug  # noqa: PLC0415

                work = partial(debug, config)
            else:
                from trainer.pipeline import run  # noqa: PLC0415

                work = partial(run, config, signals)
            gc.freeze()  # later collections skip what was imported
        signals.raise_if_received()
        work()

    return run_cli(train)


if __name__ == "__main__":
    exit_after(main)
