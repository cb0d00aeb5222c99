"""`report.html` of a run: one page that shows what the run folder holds.

A run writes it after epochs and at its end; `regraft report` writes it again, with Grad-CAM.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from regraft.contract import REPORT, own_version
from trainer.errors import UserError
from trainer.pages.advice import make_advice
from trainer.pages.calibration import describe_calibration
from trainer.pages.curves import draw_curves
from trainer.pages.galleries import Explain, describe_missing, make_galleries, pair_thumbnails
from trainer.pages.render import render, write_page
from trainer.pages.run_facts import (
    command_line,
    data_facts,
    describe_environment,
    describe_status,
    main_metrics,
    subtitle,
    training_facts,
)
from trainer.pages.run_record import RunRecord, read_run
from trainer.pages.run_sections import (
    block_rows,
    check_findings,
    class_rows,
    confusion_matrix,
    describe_errors,
    group_rows,
    pair_rows,
    weakest_classes,
)
from trainer.pages.run_time import data_wait, grad_cam_seconds, time_parts
from trainer.pages.thumbnails import PictureBudget

_MAX_PICTURE_BYTES = 3_000_000
_PAIRS_ON_TOP = 3
_SECONDS_IN_RUN = 1.0
"""Time that the pictures of a run's own page may take; `regraft report` takes as long as it needs."""


def try_write_report(folder: Path, *, pictures: bool, warn: Callable[[str], object]) -> None:
    """Write a run's page; if this fails for any reason, call `warn` with a message: a page never ends a run."""
    try:
        budget = PictureBudget(_MAX_PICTURE_BYTES if pictures else 0, max_seconds=_SECONDS_IN_RUN)
        write_page(folder / REPORT, render_report(read_run(folder), budget=budget))
    except Exception as error:  # noqa: BLE001 (a full disk, a damaged file, a broken installation)
        reason = " ".join(str(error).split())[:300]
        warn(
            f"warning: {REPORT} was not written ({type(error).__name__}: {reason}); nothing else is affected, and "
            f"regraft report {folder} writes it"
        )


def render_report(run: RunRecord, *, budget: PictureBudget | None = None, explain: Explain | None = None) -> str:
    """Return the page of a run.

    Args:
        run: what the run folder holds.
        budget: makes the thumbnails; None for one that has no limit of time.
        explain: makes the Grad-CAM overlays; None: pictures are shown alone.

    """
    budget = budget or PictureBudget(_MAX_PICTURE_BYTES)
    result = run.reported
    root = run.working_folder
    times = time_parts(run)
    seconds = sum(part.seconds for part in times)
    pairs = result.confusions() if result is not None else []
    split = result.split if result is not None else ""
    top_pairs = [
        (pair, pair_thumbnails(run.predictions, split, pair, budget=budget, root=root))
        for pair in pairs[:_PAIRS_ON_TOP]
    ]  # before the galleries, which may use up the budget
    galleries = make_galleries(run.predictions, split, budget=budget, root=root, explain=explain)
    matrix, classes, curves = confusion_matrix(result), class_rows(result), draw_curves(run)
    calibration = describe_calibration(run, result)
    sections = (
        ("confusions", "Confusions", matrix),
        ("pictures", "Pictures", galleries),
        ("classes", "Classes", classes),
        ("training", "Training", curves),
        ("calibration", "Calibration", calibration),
        ("data", "Data", True),
        ("time", "Time", times),
        ("reproduce", "Reproduce", True),
    )
    return render(
        "report.html.jinja",
        run=run,
        sections={section: heading for section, heading, content in sections if content},
        name=run.folder.resolve().name,
        result=result,
        status=describe_status(run),
        subtitle=subtitle(run),
        metrics=main_metrics(result, seconds),
        advice=make_advice(run),
        pairs=top_pairs,
        errors=describe_errors(result),
        pair_rows=pair_rows(pairs),
        num_pairs=len(pairs),
        weakest=weakest_classes(result),
        matrix=matrix,
        galleries=galleries,
        missing=describe_missing(galleries, root),
        has_heatmaps=explain is not None,
        grad_cam_seconds=grad_cam_seconds(run, sum(len(gallery.pictures) for gallery in galleries)),
        class_rows=classes,
        curves=curves,
        training_facts=training_facts(run),
        blocks=block_rows(run),
        groups=group_rows(run),
        calibration=calibration,
        time_parts=times,
        total_time=seconds,
        data_wait=data_wait(run),
        data_facts=data_facts(run),
        checked=check_findings(run),
        command=command_line(run),
        environment=describe_environment(run),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=own_version(),
    )


def save_page(output: Path, page: str) -> None:
    """Write a page to a file that the user has named.

    Raises:
        UserError: it cannot be written.

    """
    try:
        write_page(output, page)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); choose another --output") from None
