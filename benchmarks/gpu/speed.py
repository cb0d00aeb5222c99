"""Measurements of speed on a GPU: one pair of runs each, as a ratio that is compared with what is asked for."""

from dataclasses import replace

from benchmarks.gpu.workplace import CheckSkipped, Details, Workplace
from benchmarks.measure import Program, cores, is_installed, run

ALONE, D2L, TIMM = 0.95, 30.0, 3.0
"""Least ratios of end to end to the model alone, to the D2L loop, and to timm."""


def regraft(work: Workplace, model: str, batch_size: int) -> Program:
    """Return regraft with its default settings."""
    epochs = {"resnet18": 6, "resnet50": 4}.get(model, 2)
    threads = max(1, cores() // 2)
    return Program(name="regraft", model=model, batch_size=batch_size, epochs=epochs, lr=1e-4, threads=threads)


def end_to_end(work: Workplace, model: str, batch_size: int) -> Details:
    """Compare training from JPEG files, after the first epoch, with the model alone on a batch in memory.

    The ratio is that of the default settings; that of images in the memory of the device is measured beside it.
    """
    ours = regraft(work, model, batch_size)
    on_device = replace(ours, extra=(f"data.cache_images={work.image_cache}",))
    alone = replace(ours, name="resident_batch", precision="bf16")
    results = [run(program, work.many_images()) for program in (ours, on_device, alone)]
    rates = [result.later for result in results]
    return {**_ratio(rates[0], rates[2], ALONE), "ratio with images on the device": rates[1] / rates[2]}


def d2l(work: Workplace) -> Details:
    """Compare the default settings with the D2L loop in fp32, which decodes in the training process."""
    ours = regraft(work, *work.speed_combinations[0])
    loop = replace(ours, name="d2l_loop", precision="fp32", epochs=2)
    first, second = run(ours, work.many_images()), run(loop, work.loop_images())
    return _ratio(first.later, second.later, D2L)


def timm(work: Workplace) -> Details:
    """Compare the default settings with timm in bf16 and channels_last, with a worker process on every other core."""
    if not is_installed("timm"):
        raise CheckSkipped("timm is not installed")
    model, batch_size = work.speed_combinations[0] if work.on_gpu else ("mobilenet_v3_small", 4)
    ours = regraft(work, model, batch_size)
    other = replace(ours, name="timm_train", workers=max(1, cores() - 1))
    results = [run(program, work.many_images()) for program in (ours, other)]
    return _ratio(results[0].later, results[1].later, TIMM)


def _ratio(ours: float, other: float, asked: float) -> Details:
    return {"ratio": ours / other, "asked": asked, "images/s": ours, "images/s of the other": other}
