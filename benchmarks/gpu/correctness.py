"""Checks of correctness on a GPU. Each returns what it has measured, or raises CheckFailed or CheckSkipped."""

import json
import subprocess

from benchmarks.fingerprints import fingerprint, stop_in_mid_epoch
from benchmarks.gpu.training import TORCHRUN, command, compare, compare_epochs, require_option, train
from benchmarks.gpu.workplace import CheckFailed, CheckSkipped, Details, Workplace

ROUNDING = 1e-3
"""Largest relative difference of a loss that differences of rounding in fp32 may grow to within 16 updates."""
HALF = 5e-2
"""Largest relative difference of an epoch's mean loss in 16-bit precision."""
BASIC = "--data.augment=basic"


def fp32(work: Workplace) -> Details:
    """Compare the losses of every step and the evaluations in fp32 with those of the CPU."""
    return compare(train(work, "fp32"), train(work, "cpu", "--run.device=cpu"), ROUNDING)


def evaluation(work: Workplace) -> Details:
    """Compare the answers of the trained model on the device and on the CPU."""
    import torch  # noqa: PLC0415 (a missing torch is an error of `machine`, not of the import of this module)

    import regraft  # noqa: PLC0415

    loaded = regraft.load(train(work, "fp32").folder)
    files = sorted((work.small_images() / "val").rglob("*.jpg"))
    images = torch.stack([loaded.preprocess(file) for file in files])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        expected = loaded.module(images)
        logits = loaded.module.to(work.device)(images.to(work.device)).cpu()
    largest = float((logits - expected).abs().max() / expected.abs().max())
    if not largest <= ROUNDING:
        raise CheckFailed(f"logits differ by {largest:.1e} of the largest, expected at most {ROUNDING:.0e}")
    return {"images": len(files), "largest difference of a logit": largest}


def bf16(work: Workplace) -> Details:
    """Compare bf16 with fp32."""
    return compare_epochs(train(work, "bf16", "--train.precision=bf16"), train(work, "fp32"), HALF)


def fp16(work: Workplace) -> Details:
    """Compare fp16 with fp32, and find the loss scaler in the checkpoint."""
    if not work.on_gpu:
        raise CheckSkipped("a CPU does not train in fp16")
    run = train(work, "fp16", "--train.precision=fp16", "--checkpoint.every=1 epoch")
    compared = compare_epochs(run, train(work, "fp32"), HALF)
    states = [json.loads(file.read_text()) for file in sorted((run.folder / "checkpoints").glob("*/state.json"))]
    scales = [state["scaler"]["scale"] for state in states if state.get("scaler")]
    if not scales or scales[-1] < 1:
        raise CheckFailed(f"the checkpoints have the loss scales {scales}, expected one of at least 1")
    return {**compared, "loss scale": scales[-1]}


def resume(work: Workplace) -> Details:
    """Kill a run in its second epoch, resume it, and compare all metrics and weights with an uninterrupted run."""
    options = ("--checkpoint.every=1 steps", "--regularization.ema=0.9", "--regularization.mixup=0.2", BASIC)
    whole = train(work, "whole", *options)
    words, folder = command(work, "killed", *options), work.folder / "runs" / "killed"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not folder.exists():
        stop_in_mid_epoch(words, folder, **quiet)
    resumed = train(work, "killed", *options)
    if fingerprint(resumed.folder) == fingerprint(whole.folder):
        return {"bit-identical": True, "attempts": len(list((folder / "attempts").glob("*.json")))}
    again = train(work, "whole-again", *options)
    if fingerprint(again.folder) == fingerprint(whole.folder):
        raise CheckFailed("two uninterrupted runs are bit-identical, and the resumed run differs from them")
    noise = max(abs(a - b) / abs(b) for a, b in zip(again.losses, whole.losses, strict=True))
    return {"bit-identical": False, "noise between uninterrupted runs": noise, **compare(resumed, whole, 10 * noise)}


def nccl(work: Workplace) -> Details:
    """Compare a world of one process, started by torchrun, with a run without a process group."""
    return compare(train(work, "torchrun", launcher=TORCHRUN), train(work, "fp32"), 1e-6)


def channels_last(work: Workplace) -> Details:
    """Compare both memory layouts."""
    runs = [train(work, f"layout-{value}", f"--train.channels_last={value}") for value in ("true", "false")]
    return compare(runs[0], runs[1], ROUNDING)


def device_data(work: Workplace) -> Details:
    """Compare images that stay on the device and are cropped there with images that are decoded in every epoch."""
    require_option("data", "cache_images", work.image_cache)
    values = (work.image_cache, "off")
    runs = [train(work, f"images-{value}", BASIC, f"--data.cache_images={value}") for value in values]
    return compare(runs[0], runs[1], 2e-2)


def gradient_checkpointing(work: Workplace) -> Details:
    """Compare recomputed activations with stored ones."""
    require_option("train", "gradient_checkpointing")
    run = train(work, "gradient-checkpointing", "--train.gradient_checkpointing=true")
    return compare(run, train(work, "fp32"), ROUNDING)


def compiled(work: Workplace) -> Details:
    """Compare torch.compile with eager mode."""
    require_option("train", "compile")
    if not work.on_gpu:
        raise CheckSkipped("compiling takes minutes")
    return compare(train(work, "compiled", "--train.compile=true"), train(work, "fp32"), ROUNDING)


def micro_batches(work: Workplace) -> Details:
    """Let the run find the largest micro-batch, which is the whole batch here, and compare it with the plain run."""
    require_option("train", "micro_batch_size", "auto")
    return compare(train(work, "micro-batches", "--train.micro_batch_size=auto"), train(work, "fp32"), ROUNDING)


def cached_features(work: Workplace) -> Details:
    """Compare the training of the head on cached features with that on images."""
    require_option("train", "cache_features")
    head = "--transfer.trainable=head"
    runs = [train(work, f"features-{value}", head, f"--train.cache_features={value}") for value in ("auto", "off")]
    return compare(runs[0], runs[1], ROUNDING)
