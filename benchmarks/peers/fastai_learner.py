"""fastai: a `Learner` on a torchvision model, with its own loaders and its batch augmentation on the device."""

from fastai.vision.all import (
    SGD,
    Callback,
    CrossEntropyLossFlat,
    ImageDataLoaders,
    Learner,
    MixedPrecision,
    Normalize,
    RandomResizedCrop,
    Resize,
    accuracy,
    aug_transforms,
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
    if settings.precision == "bf16" and settings.device.type == "cpu":
        raise SystemExit("fastai has no mixed precision on a CPU")
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
    model, _, _ = torchvision_model(settings, loaders.c)
    learner = Learner(loaders, model, CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy)
    callbacks = [Clock(Recorder(settings))]
    if settings.precision == "bf16":
        callbacks.append(MixedPrecision(amp_mode="bf16"))
    with learner.no_bar(), learner.no_logging():
        learner.fit(settings.epochs, settings.lr, wd=1e-3, cbs=callbacks)


if __name__ == "__main__":
    main()
