"""What a run's report states in words: state, training, data, command and environment."""

import shlex
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from regraft.contract import MODEL, last_heartbeat
from trainer.pages.render import decimal, duration, percent
from trainer.pages.run_files import number
from trainer.pages.run_record import RunRecord
from trainer.pages.split_result import SplitResult

_MAX_REASON = 200
_DEAD_AFTER_SECONDS = 45.0
"""Seconds without a heartbeat (one is due every 10) after which a run counts as dead, as in `regraft status`."""


def describe_status(run: RunRecord) -> str:
    """Return the state of a run in a few words."""
    done, epochs = len(run.epochs), run.option("train.epochs")
    position = f"epoch {done} of {epochs}" if isinstance(epochs, int) else f"epoch {done}"
    if run.is_evaluated:
        early = isinstance(epochs, int) and 0 < done < epochs
        return f"finished after {position}{' (early stopping)' if early else ''}"
    latest = run.attempts[-1] if run.attempts else None
    if latest is None or latest.state == "done":
        return position
    if latest.state == "running":
        heartbeat = last_heartbeat(run.root, latest.attempt)
        is_alive = heartbeat is not None and time.time() - heartbeat < _DEAD_AFTER_SECONDS
        return f"{position}, {'running when this page was written' if is_alive else 'probably killed'}"
    reason = (latest.reason or "").partition("\\n")[0]  # the trainer escapes the line breaks of a reason
    return f"{position}, {latest.state}" + (f": {reason[:_MAX_REASON]}" if reason else "")


def subtitle(run: RunRecord) -> list[str]:
    """Return the model, the dataset, and which weights the result is of."""
    strategy, result = run.option("transfer.strategy"), run.reported
    dataset = Path(str(run.option("data.root") or "unknown data")).name
    entries = [
        str(run.model.architecture if run.model is not None else run.option("model.name", "unknown model")),
        dataset if result is None else f"{dataset}: {len(result.classes):,} classes",
        f"strategy {strategy}" if strategy else "",
    ]
    if run.is_evaluated and (epoch := number(run.evaluation, "epoch")) is not None:
        entries.append(f"result of {MODEL}, which has the weights of epoch {epoch:g}")
    elif run.epochs:
        entries.append(f"result after epoch {run.epochs[-1]['epoch']:g}")
    return [entry for entry in entries if entry]


def main_metrics(result: SplitResult | None, seconds: float) -> list[tuple[str, str]]:
    """Return the metrics of a result that are known, and the time of the run."""
    if result is None:
        return []
    known = {name: value for name, value in result.metrics.items() if value is not None}
    shown = [
        ("Balanced accuracy", "balanced_accuracy", percent),
        ("Top-5 accuracy", "top5_accuracy", percent),
        ("F1 (macro)", "f1_macro", decimal),
        ("Log loss", "log_loss", decimal),
        ("AUROC (macro)", "auroc_macro", decimal),
    ]
    rows = [(label, text(known[name])) for label, name, text in shown if name in known]
    recalls = [entry.recall for entry in result.classes if entry.support]
    if len(recalls) > 1:
        rows.insert(0, ("Weakest class", f"{percent(min(recalls))} right"))
    return [*rows, ("Time (min:s)" if seconds < 3600 else "Time (h:min:s)", duration(seconds))] if seconds else rows


def training_facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return names and values of what was trained, and how."""
    result, head = run.reported, str(run.option("model.head_init", "–"))
    if run.start is not None and result is not None:
        accuracy = number(run.start, f"{result.split}_accuracy")
        head += "" if accuracy is None else f", {percent(accuracy)} on {result.split} before the first update"
    entries = [
        ("trained layers", run.option("transfer.trainable", "–")),
        ("output layer", head),
        ("BatchNorm", run.option("transfer.batch_norm", "–")),
        (
            "optimizer",
            f"{run.option('optim.name', '–')}, weight decay {run.option('optim.weight_decay', '–')}, "
            f"schedule {run.option('optim.schedule', '–')}",
        ),
        ("batch size", run.option("train.batch_size", "–")),
        ("augmentation", run.option("data.augment", "–")),
    ]
    if run.model is not None:
        parameters = f"{run.model.architecture}, {run.model.parameters:,} parameters"
        entries = [("model", parameters), ("began from", run.model.source), *entries]
    return [(name, str(value)) for name, value in entries]


def data_facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return names and values of the data."""
    seen = number(run.epochs[-1], "train_seen") if run.epochs else None
    splits = [f"train {seen:,.0f}"] if seen is not None else []
    splits += [f"{split} {result.examples:,}" for split, result in run.splits.items()]
    return [
        ("dataset", str(run.option("data.root", "–"))),
        ("images", ", ".join(splits) or "–"),
        ("classes", f"{len(run.reported.classes):,}" if run.reported is not None else "–"),
        ("image size", f"{run.option('data.image_size', '–')} px"),
    ]


def command_line(run: RunRecord) -> str:
    """Return the command line of the latest start."""
    words = run.environment.get("argv")
    return shlex.join(map(str, words)) if isinstance(words, list) else ""


def describe_environment(run: RunRecord) -> list[tuple[str, str]]:
    """Return names and values of the environment of the latest start."""
    record = run.environment
    hosts, git, versions = (record.get(key) for key in ("hosts", "git", "versions"))
    entries: list[tuple[str, Any]] = []
    for host in hosts if isinstance(hosts, list) else ():
        if isinstance(host, dict):
            ranks, gpus = (value if isinstance(value, list) else [] for value in (host.get("ranks"), host.get("gpus")))
            entries.append(("machine", f"{host.get('host')}: {host.get('cpu')}, {host.get('usable_cores')} cores"))
            entries.append(("processes", f"{len(ranks)}, on {', '.join(map(str, gpus)) or 'the CPU'}"))
            entries.append(("system", host.get("platform")))
    if isinstance(versions, dict):
        entries.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if isinstance(git, dict) and git.get("commit"):
        entries.append(("git commit", f"{git['commit']}{', with changes' if git.get('dirty') else ''}"))
    for attempt in run.attempts:
        reason = f" ({attempt.reason})" if attempt.reason else ""
        entries.append((f"start {attempt.attempt}", f"{_format_time(attempt.began)}: {attempt.state}{reason}"))
    return [(name, str(value)) for name, value in entries if value is not None]


def _format_time(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text
