"""An experiment tracker in a thread of its own, so that a slow or broken connection never delays or ends a run."""

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from accelerate.tracking import GeneralTracker

from trainer.errors import UserError
from trainer.report import tracker_services as services
from trainer.report.tracker_entries import Entry, final_position
from trainer.run.atomic import write_text_atomically

_START_TIMEOUT = 120.0
"""Seconds; wandb gives up after 90."""


@dataclass(frozen=True, kw_only=True)
class TrackerState:
    """What is stored in the run folder, so that a resumed run continues the tracker's run."""

    id: str | None = None
    """Identity of the tracker's run; None before it has begun."""
    position: tuple[int, int] = (-1, 0)
    """Position of the last entry that was sent."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the state in a file; that of a new run if the file is missing or damaged."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            step, kind = map(int, fields["position"])
            return cls(id=str(fields["id"]), position=(step, kind))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return cls()

    def write(self, path: Path) -> None:
        """Write the state to a file, atomically."""
        write_text_atomically(path, json.dumps({"id": self.id, "position": self.position}) + "\n")


class TrackerThread:
    """Sends entries to a tracker. What could not be sent is sent again together with the next entry."""

    location = ""
    """Where a person finds the run: a URL, a folder, or its name."""

    def __init__(
        self,
        service: services.Service,
        run: services.TrackerRun,
        *,
        resumed: bool,
        check: Callable[[], None],
        warn: Callable[[str], object],
    ) -> None:
        """Prepare a tracker.

        Args:
            service: name of the tracker.
            run: the run in the tracker.
            resumed: whether the run was resumed: it continues the tracker's run of the earlier start.
            check: raises a UserError if this process may no longer write into the run folder.
            warn: prints a warning.

        """
        self.service, self._run = service, run
        self._path = run.folder / f"{service}.json"
        self._state = TrackerState.read(self._path) if resumed else TrackerState()
        self._sent_before = self._state.position
        self._check, self._warn, self._has_warned = check, warn, False
        self._entries: SimpleQueue[Entry | None] = SimpleQueue()
        self._started, self._start_error = threading.Event(), ""
        self._thread: threading.Thread | None = None

    def has_finished(self, step: int) -> bool:
        """Return whether an earlier start has sent everything of a run that has ended after `step` updates."""
        return self._sent_before >= final_position(step)

    def start(self, config: Mapping[str, Any]) -> None:
        """Start the run in the tracker, or continue it, and wait until it has begun.

        Args:
            config: option -> value.

        Raises:
            UserError: a new run could not be started. That one could not be continued is a warning.

        """
        thread = threading.Thread(target=self._work, args=(config,), name=f"tracker {self.service}", daemon=True)
        is_new = self._state.id is None
        thread.start()
        if not self._started.wait(_START_TIMEOUT):
            self._start_error = f"no answer within {_START_TIMEOUT:.0f} s"
        if not self._start_error:
            self._thread = thread
        elif is_new:
            raise UserError(
                f"run.trackers: {self.service} could not be started ({self._start_error}). Fix its settings or its "
                "connection, or remove it from run.trackers"
            )
        else:
            self._warn(f"warning: {self.service} could not be continued, and receives nothing ({self._start_error})")

    def put(self, entry: Entry) -> None:
        """Send an entry soon, unless an earlier start has sent it. Return at once."""
        if entry.position > self._sent_before:
            self._entries.put(entry)

    def end(self) -> None:
        """Tell the thread to send what is left, and to end the run in the tracker. Return at once."""
        self._entries.put(None)

    def join(self, timeout: float) -> None:
        """Wait until the run in the tracker has ended; give up after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._warn_once(f"it has not received everything after {timeout:.0f} s of waiting")

    def _work(self, config: Mapping[str, Any]) -> None:
        """Run in the thread: some trackers know their run only in the thread that has started it."""
        try:
            tracker = services.start(self.service, replace(self._run, id=self._state.id), config)
            self.location = services.location(self.service, tracker, self._run)
            self._state = replace(self._state, id=services.run_id(self.service, tracker))
            self._state.write(self._path)
        except Exception as error:  # noqa: BLE001 (a missing key, no connection, a full disk, or of any other kind)
            self._start_error = _describe(error)
            return
        finally:
            self._started.set()
        unsent: deque[Entry] = deque()
        while (entry := self._entries.get()) is not None:
            unsent.append(entry)
            if self._entries.empty():
                self._send(tracker, unsent)
        for _ in range(2):
            self._send(tracker, unsent)
        try:
            tracker.finish()
        except Exception as error:  # noqa: BLE001 (as above)
            self._warn_once(_describe(error))

    def _send(self, tracker: GeneralTracker, unsent: deque[Entry]) -> None:
        sent = self._state
        try:
            self._check()
            try:
                while unsent:
                    services.send(self.service, tracker, unsent[0])
                    sent = replace(sent, position=unsent.popleft().position)
            finally:
                if sent != self._state:
                    sent.write(self._path)
                    self._state = sent
        except UserError:  # another attempt has taken over the run, which ends this one
            unsent.clear()
        except Exception as error:  # noqa: BLE001 (as above)
            self._warn_once(_describe(error))

    def _warn_once(self, reason: str) -> None:
        if not self._has_warned:
            self._warn(
                f"warning: {self.service} fails ({reason}). Training goes on, and metrics.jsonl is complete; what "
                "was not sent is sent with the next metrics, or when the run is resumed"
            )
        self._has_warned = True


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
