"""fastai: a `Learner` on a torchvision model, with its own loaders and its batch augmentation on the device.

Its documentation recommends `to_bf16` and `to_channelslast` on a GPU. Its mixed precision does not exist on a CPU.
"""

from functools import partial

import torch
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    Learner,
    Normalize,
    OptimWrapper,
    RandomResizedCrop,
    Resize,
    accuracy,
    aug_transforms,
    set_seed,
)

from benchmarks.peers.common import MEAN, STD, Recorder, read_settings, torchvision_model


class Clock(Callback):  # type: ignore[misc]
    """Records the training time and the accuracy of each epoch."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def before_train(self) -> None:
        """Start the clock."""
        self.recorder.start_epoch()

    def after_train(self) -> None:
        """Stop the clock."""
        self.recorder.end_training(len(self.learn.dls.train.dataset))

    def after_epoch(self) -> None:
        """Record the accuracy."""
        self.recorder.end_epoch(float(self.learn.recorder.log[-1]))


def main() -> None:
    """Train and evaluate."""
    settings = read_settings()
    on_cpu = settings.device.type == "cpu"
    if settings.precision == "bf16" and on_cpu:
        raise SystemExit("fastai has no mixed precision on a CPU")
    set_seed(settings.seed)
    loaders = ImageDataLoaders.from_folder(
        settings.data_root,
        valid="val",
        item_tfms=Resize(224) if settings.fixed_views else RandomResizedCrop(224, min_scale=0.08),
        batch_tfms=[*aug_transforms(do_flip=True, max_rotate=0, max_zoom=1, max_lighting=0, max_warp=0, size=224),
                    Normalize.from_stats(MEAN, STD)],
        bs=settings.batch_size,
        num_workers=settings.workers,
        device=settings.device,
    )  # fmt: skip
    model, backbone, head = torchvision_model(settings, loaders.c)
    learner = Learner(
        loaders,
        model,
        settings.criterion,
        opt_func=partial(OptimWrapper, opt=torch.optim.SGD),
        splitter=lambda _: [group for group in (backbone, head) if group],
        metrics=accuracy,
        wd_bn_bias=True,
    )
    if settings.precision == "bf16" or (settings.precision == "default" and not on_cpu):
        learner.to_bf16()
    if settings.memory_format is torch.channels_last:
        learner.to_channelslast(use_amp=False)
    lr = [settings.lr, 10 * settings.lr] if backbone else 10 * settings.lr
    with learner.no_bar(), learner.no_logging():
        learner.fit(settings.epochs, lr, wd=1e-3, cbs=[Clock(Recorder(settings))])


if __name__ == "__main__":
    main()
