"""Results of `regraft check` for tests of its page: every kind of finding, with any names."""

from collections.abc import Sequence
from pathlib import Path

from tests.folders import noise_image
from trainer.check.findings import SEVERITIES, CheckResult, DuplicateGroup, Finding, LabeledImage, LabelError
from trainer.check.images import read_images
from trainer.check.page import HEADINGS
from trainer.check.statistics import count_images, summarize


def example_result(
    folder: Path, classes: Sequence[str], *, files: Sequence[str], count: int = 12, groups: int = 2
) -> CheckResult:
    """Write images of noise to a folder, and return a result with duplicates, label errors and all kinds of findings.

    Args:
        folder: where the files are written.
        classes: names of the classes.
        files: names of the files; the images of the result take turns to use them.
        count: number of images.
        groups: number of groups of six duplicates.

    """
    folder.mkdir()
    for number, name in enumerate(files):
        noise_image(number, size=(240, 100 + number)).save(folder / name, "PNG")
    paths = [str(folder / name) for name in files]
    images = [
        LabeledImage(paths[number % len(files)], classes[number % len(classes)], ("train", "val", "test")[number % 3])
        for number in range(count)
    ]
    names = " ".join(classes)
    return CheckResult(
        root=str(folder),
        classes=tuple(classes),
        counts=count_images(images),
        sources={"test": names},
        statistics=summarize(read_images(paths, workers=1)),
        findings=tuple(
            Finding(
                kind=kind,
                severity=SEVERITIES[number % 3],
                message=f"{names}:\n  {names}",
                remedy=names,
                options=(names, f"--data.exclude {names}"),
                count=count,
                paths=tuple(image.path for image in images),
            )
            for number, kind in enumerate(HEADINGS)
        ),
        duplicates=tuple(
            DuplicateGroup(images=tuple(images[start : start + 6]), digests=("a", "b") * 3) for start in range(groups)
        ),
        label_errors=tuple(LabelError(image, names, -0.5) for image in images),
    )
