"""The options of a run, as frozen dataclasses. The docstrings of the fields are the texts of `--help`.

Each section checks its own values when it is created; `Config` checks values that depend on each other.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from trainer.data.csv_columns import ROLES as CSV_ROLES
from trainer.data.group_by import check_pattern
from trainer.data.normalization import find_wrong_normalization
from trainer.errors import UserError
from trainer.optim.schedule import parse_duration, parse_interval

_MAX_SEED = 2**63 - 1


def _check(option: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UserError(f"{option} is {value}: expected {expected}")


def _is_positive(value: float | None) -> bool:
    """Return whether a value is null or a finite number above 0."""
    return value is None or 0 < value < math.inf


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run folder, seed, device and resume."""

    dir: str = "runs/default"
    """Run folder, which receives all output files; if not set, a run with other options than that of runs/default goes to runs/default-2."""
    seed: int = 0
    """Random seed of the initialization, the order of the examples and their augmentation."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Resume from the newest checkpoint if there is one (auto), start over and archive the old run (never), or fail without a checkpoint (must)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto uses the GPU if there is one."""
    threads: int | None = None
    """CPU threads per process; null divides this machine's physical cores among its processes, or half of all cores if they use GPUs."""
    hang_timeout: float | Literal["auto"] | None = "auto"
    """Watchdog timeout of a step [seconds], after which the processes write their stacks and exit; auto adapts to the step time; null is off."""

    audit: bool = False
    """Audit files to compare runs: the examples, pixel checksums and learning rate of every update."""
    report: Literal["auto", "off"] = "auto"
    """HTML report in the run folder, report.html: written during the run and at its end (auto), or not (off)."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers that receive config, metrics and pictures, such as tensorboard or tensorboard,mlflow; a resumed run continues theirs."""
    tracker_project: str = "regraft"
    """Project of the run in wandb and trackio, and its experiment in mlflow."""

    def __post_init__(self) -> None:
        if not self.dir.strip():
            raise UserError("run.dir is empty: expected a folder that the run can write to")
        _check("run.seed", self.seed, 0 <= self.seed <= _MAX_SEED, "0 to 2^63 - 1")
        _check("run.threads", self.threads, self.threads is None or self.threads >= 1, "1 or more, or null")
        valid = not isinstance(self.hang_timeout, int | float) or 0 < self.hang_timeout <= 1e6
        expected = "seconds (above 0, up to 1,000,000), auto, or null"
        _check("run.hang_timeout", self.hang_timeout, valid, expected)
        valid = re.fullmatch(r"[\w.-]{1,100}", self.tracker_project) is not None
        _check("run.tracker_project", repr(self.tracker_project), valid, "up to 100 letters, digits, _, - and .")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Dataset, preprocessing and augmentation."""

    root: str | None = None
    """Dataset: a folder of images, a CSV file (path,label,split) or a dataset name (hotdog, synthetic-source, synthetic-target)."""
    train_dir: str | None = None
    """Training folder with one folder per class, relative to data.root, where '.' is data.root itself; null looks for train/ or training_set/."""
    val_dir: str | None = None
    """Validation folder, relative to data.root; null looks for val/, valid/ or dev/, unless train_dir is set."""
    test_dir: str | None = None
    """Test folder, relative to data.root; null looks for test/ or testing/, unless train_dir is set."""
    csv_columns: dict[str, str] = field(default_factory=dict)
    """CSV columns of path, label, split and group, such as {path: id, label: breed}; common names are recognized; no split divides a group."""
    csv_root: str | None = None
    """Folder of the images of a CSV, relative to the CSV; null is the folder of the CSV."""
    csv_suffix: str | None = None
    """File extension to add to the paths of a CSV, such as .jpg for a column of ids; null adds none."""
    exclude: str | None = None
    """Excluded images: a CSV with a column path, or a list of paths, relative to data.root or absolute, which are left out of every split."""
    group_by: str | None = None
    """Group pattern: regular expression whose capturing group in an image's relative path names what no split divides, such as '(patient[0-9]+)'."""
    image_size: int | None = None
    """Image size of the model's square input [pixels]; null uses that of the weights."""
    resize_size: int | None = None
    """Resize size before the central crop in evaluation [pixels]; null scales that of the weights with image_size."""
    resize: Literal["squash", "shorter"] | None = None
    """Resize both sides (squash) or the shorter side (shorter) to resize_size in evaluation; null uses the model file's setting, else squash."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation of every resize; null uses that of the weights."""
    mean: tuple[float, ...] | None = None
    """Mean of red, green and blue for normalization, in [0, 1]; null uses that of the weights."""
    std: tuple[float, ...] | None = None
    """Standard deviation of red, green and blue for normalization, in [0, 1]; null uses that of the weights."""
    augment: Literal["basic", "none", "trivialaugment", "randaugment", "augmix"] = "basic"
    """Augmentation of training images: random crop and flip (basic), none, or basic followed by a torchvision policy."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Crop scale: smallest and largest area of a random training crop, as fractions of the image."""
    random_erasing: float = 0.0
    """Random erasing probability of a training image."""
    views: int | None = None
    """Number of fixed random views of each training image, which the epochs show in turn; null draws a new one in every epoch."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Sampling of an epoch: each example once (shuffled) or each class equally often (balanced)."""
    val_fraction: float = 0.0
    """Validation split: fraction of the training images held out to select the best epoch; 0 holds out none."""
    test_fraction: float = 0.2
    """Test split: fraction of the images held out if the dataset has no val or test split."""
    seed: int = 0
    """Random seed of the splits and of the synthetic datasets."""
    extensions: tuple[str, ...] = (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp",
        ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
    )  # fmt: skip
    """File extensions of images, in upper or lower case; other files are ignored and counted."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """Unreadable images: stop before training and list them, or skip and list them."""
    on_changed: Literal["stop", "continue"] = "stop"
    """Images whose content has changed when a run resumes: stop and name them, or name them and continue."""
    num_workers: int | None = None
    """Worker processes per training process that decode images; null chooses by available cores; 0 decodes in the training process."""
    cache: str | None = None
    """Cache folder of downloads, synthetic datasets, validation results and decoded images; null uses $REGRAFT_CACHE, else ~/.cache/regraft."""
    cache_images: Literal["auto", "off", "disk", "ram", "device"] = "auto"
    """Image cache: up to half of the available memory (auto) or disk (disk), memory alone (ram), also the GPU's (device), or none (off)."""
    cache_resize: int | None = None
    """Resize of training images before their random crops: shorter side [pixels], which changes the pixels but saves space and time; null does not resize."""

    def __post_init__(self) -> None:
        wrong_roles = sorted({*self.csv_columns} - {*CSV_ROLES})
        if wrong_roles:
            raise UserError(f"data.csv_columns has {wrong_roles}: expected the keys {', '.join(CSV_ROLES)}")
        for key in ("train_dir", "val_dir", "test_dir", "csv_root", "exclude"):
            path: str | None = getattr(self, key)
            kind = "file" if key == "exclude" else "folder"
            _check(f"data.{key}", repr(path), path is None or bool(path.strip()), f"a {kind}, or null")
        if self.group_by is not None:
            check_pattern("data.group_by", self.group_by)
            if "group" in self.csv_columns:
                raise UserError("data.group_by and the group of data.csv_columns are both set: set one of them")
        for key in ("image_size", "resize_size", "cache_resize"):
            size: int | None = getattr(self, key)
            _check(f"data.{key}", size, size is None or 1 <= size <= 8192, "1 to 8192 pixels, or null")
        if reason := find_wrong_normalization(self.mean, self.std):
            raise UserError(f"data.{reason}")
        if (self.mean is None) != (self.std is None):
            raise UserError("data.mean and data.std belong together: set both or neither")
        _check("data.random_erasing", self.random_erasing, 0 <= self.random_erasing <= 1, "a probability, 0 to 1")
        _check("data.views", self.views, self.views is None or self.views >= 1, "1 or more, or null")
        if self.cache_images == "device" and (self.augment, self.random_erasing) != ("none", 0.0):
            augment = f"{self.augment} with data.random_erasing {self.random_erasing}"
            expected = "basic, or none without random erasing, if data.cache_images is device"
            _check("data.augment", augment, self.augment == "basic", expected)
        low, high = self.crop_scale
        _check("data.crop_scale", self.crop_scale, 0 < low <= high <= 1, "0 < smallest <= largest <= 1")
        for key in ("val_fraction", "test_fraction"):
            fraction: float = getattr(self, key)
            _check(f"data.{key}", fraction, 0 <= fraction < 1, "a fraction from 0 to below 1")
        _check("data.seed", self.seed, 0 <= self.seed <= _MAX_SEED, "0 to 2^63 - 1")
        workers = self.num_workers
        _check("data.num_workers", workers, workers is None or workers >= 0, "0 or more, or null")
        wrong = [text for text in self.extensions if not (text.startswith(".") and len(text) > 1)]
        if wrong:
            raise UserError(
                f"data.extensions contains {wrong}: expected extensions with a dot, such as ['.jpg', '.gif']"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture, pretrained weights and initialization of the head."""

    name: str = "resnet18"
    """Model name: a classification model of torchvision, or a model of timm as timm/NAME."""
    weights: str | None = "DEFAULT"
    """Pretrained weights: DEFAULT, another torchvision name (IMAGENET1K_V1), a safetensors or PyTorch file, a run or Hugging Face folder, or null for random ones."""
    weights_key: str = "auto"
    """Key or prefix of the model in the weights file, such as model_ema or teacher; auto finds it, and prefers raw weights to averaged ones."""
    allow_partial_weights: bool = False
    """Partial weights: tensors of the backbone that the weights lack or have in another shape stay random, instead of an error."""
    head_init: Literal["xavier", "torch", "source-labels", "linear-probe"] = "xavier"
    """Head initialization: Xavier-uniform (xavier), PyTorch's default (torch), pretrained rows of matching classes (source-labels), or logistic regression on features (linear-probe)."""
    source_labels: str = "auto"
    """Class names of the pretrained model for head_init source-labels: those of the weights (auto), or a text file with one name per line."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Class name mapping from yours to the pretrained model's for head_init source-labels, such as {dachshund puppy: dachshund}."""
    dropout: float | None = None
    """Dropout probability of the model's dropout layers; null keeps the model's default."""
    stochastic_depth: float | None = None
    """Stochastic depth probability of the last residual block, proportionally lower in earlier blocks; null keeps the model's default."""

    def __post_init__(self) -> None:
        for key in ("dropout", "stochastic_depth"):
            probability: float | None = getattr(self, key)
            valid = probability is None or 0 <= probability < 1
            _check(f"model.{key}", probability, valid, "0 to below 1, or null")
        if self.weights is not None and not self.weights.strip():
            raise UserError(
                "model.weights is empty: expected DEFAULT or another name of torchvision, a file or folder, or null"
            )
        if not self.weights_key.strip():
            raise UserError("model.weights_key is empty: expected auto, or a key or prefix in the weights file")
        if not self.source_labels.strip():
            raise UserError("model.source_labels is empty: expected auto, or a text file with one name per line")


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Strategy, trainable parameters, BatchNorm, L2-SP and WiSE-FT."""

    strategy: str | None = None
    """Strategy whose options apply: d2l, head-only, lp-ft, gradual-unfreezing, strong-regularization, from-scratch, or a YAML file; null is none."""
    trainable: dict[int, str] | str = "all"
    """Trainable parameters: all, head, from:MODULE, last:N, names and patterns ('layer4, *.bias'), or unfreezing stages by epoch ({0: head, 2: all})."""
    batch_norm: Literal["frozen-with-weights", "frozen", "train", "sync"] = "frozen-with-weights"
    """BatchNorm mode: statistics frozen everywhere (frozen) or in frozen layers only (frozen-with-weights), of each process (train), or of the global batch on GPUs (sync)."""
    l2_sp: float = 0.0
    """L2-SP strength: penalty on the distance to the pretrained weights, which replaces weight decay outside the head; 0 is off."""
    wise_ft: bool = False
    """WiSE-FT: after training, interpolate the initial and fine-tuned weights and keep the best on the validation split."""

    def __post_init__(self) -> None:
        _check("transfer.l2_sp", self.l2_sp, 0 <= self.l2_sp < math.inf, "0 or more")
        if self.trainable == "":
            raise UserError("transfer.trainable is empty: expected all, head, from:MODULE, last:N, patterns, or stages")
        if isinstance(self.trainable, dict):
            expected = "stages that start with epoch 0, such as {0: head, 1: layer4, 3: all}"
            _check("transfer.trainable", self.trainable, min(self.trainable, default=-1) == 0, expected)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, parameter groups and learning rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer name."""
    lr: float = 1e-3
    """Learning rate of the backbone at its peak; with loss_reduction sum, use the mean loss's rate divided by batch_size."""
    head_lr_scale: float = 10.0
    """Learning rate of the head as a multiple of optim.lr."""
    weight_decay: float = 1e-4
    """Weight decay: its product with the weight is added to the gradient (sgd), or decoupled from it (adamw)."""
    decay_norm_and_bias: bool = True
    """Weight decay on biases, normalization layers and other one-dimensional parameters too."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: factor from each block to the one before it; 1 is off."""
    lr_mult: dict[str, float] = field(default_factory=dict)
    """Learning rate multipliers by module or parameter name pattern, such as {layer1: 0.1}; the last match applies."""
    momentum: float = 0.9
    """Momentum of sgd."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Loss reduction over the examples of the global batch."""
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    """Learning rate schedule after warmup: constant, half cosine to 0, or one-cycle."""
    warmup: str = "0 steps"
    """Warmup length of the learning rate: '100 steps', '1 epochs' or '5%'."""
    max_grad_norm: float | None = None
    """Gradient clipping: maximum norm of the whole gradient; null is off."""

    def __post_init__(self) -> None:
        _check("optim.lr", self.lr, _is_positive(self.lr), "a number above 0")
        _check("optim.head_lr_scale", self.head_lr_scale, _is_positive(self.head_lr_scale), "a number above 0")
        _check("optim.weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _check("optim.layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0, up to 1")
        wrong = {name: factor for name, factor in self.lr_mult.items() if not _is_positive(factor)}
        if wrong:
            raise UserError(
                f"optim.lr_mult contains {wrong}: expected factors above 0; use transfer.trainable to freeze parameters"
            )
        _check("optim.momentum", self.momentum, 0 <= self.momentum < 1, "0 to below 1")
        norm = self.max_grad_norm
        _check("optim.max_grad_norm", norm, _is_positive(norm), "a number above 0, or null")
        parse_duration("optim.warmup", self.warmup)


@dataclass(frozen=True, kw_only=True)
class RegularizationConfig:
    """Label smoothing, mixup, CutMix, EMA and early stopping."""

    label_smoothing: float = 0.0
    """Label smoothing: fraction of each target that is spread over all classes."""
    mixup: float = 0.0
    """Mixup alpha of the Beta distribution, with partners from the global batch; 0 is off."""
    cutmix: float = 0.0
    """CutMix alpha of the Beta distribution; if mixup is on too, each batch uses one of the two; 0 is off."""
    class_weights: Literal["none", "balanced"] = "none"
    """Class weights of the training loss: none, or inversely proportional to class frequency with mean 1 (balanced)."""
    ema: float | None = None
    """EMA decay per update of the averaged weights and BatchNorm statistics, which are evaluated and saved; null is off."""
    early_stopping: int | None = None
    """Early stopping after this many epochs without a better result on the validation split; null is off."""

    def __post_init__(self) -> None:
        smoothing, ema, patience = self.label_smoothing, self.ema, self.early_stopping
        _check("regularization.label_smoothing", smoothing, 0 <= smoothing < 1, "0 to below 1")
        for key in ("mixup", "cutmix"):
            alpha: float = getattr(self, key)
            _check(f"regularization.{key}", alpha, 0 <= alpha < math.inf, "0 or more")
        _check("regularization.ema", ema, ema is None or 0 < ema < 1, "above 0 and below 1, or null")
        valid = patience is None or patience >= 1
        _check("regularization.early_stopping", patience, valid, "1 epoch or more, or null")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Epochs, batch size, precision and logging."""

    epochs: int = 5
    """Epochs: passes over the training set."""
    batch_size: int = 32
    """Batch size of one update over all processes (global batch)."""
    grad_accum_steps: int = 1
    """Gradient accumulation steps per update, which save memory and leave the update the same."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Micro-batch size: largest number of images per process in one forward and backward; auto finds what fits in memory, null uses grad_accum_steps."""
    cache_features: Literal["auto", "off"] = "auto"
    """Feature cache: compute the output of frozen layers once for images that are the same in every epoch (auto), or in every step (off)."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Precision of forward and backward; auto measures a few updates before the run and takes the fastest that is accurate."""
    channels_last: bool | Literal["auto"] = "auto"
    """Memory format channels_last for images and convolutions; auto measures which is faster; results differ by rounding only."""
    compile: bool = False
    """Compile the model by torch.compile: faster updates after minutes of compilation; results differ by rounding only."""
    gradient_checkpointing: bool = False
    """Gradient checkpointing: recompute the activations of each block in backward, which saves memory, takes longer and leaves results the same."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of frozen weights in memory; bfloat16 halves it, needs precision bf16, and leaves updates the same."""
    logs_per_epoch: int = 5
    """Logs per epoch: how often metrics are read from the device, shown and written."""

    @property
    def uses_channels_last(self) -> bool:
        """Return whether images and convolutions are in channels_last; they are until `auto` has been measured."""
        return self.channels_last is not False

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "grad_accum_steps", "logs_per_epoch"):
            value: int = getattr(self, key)
            _check(f"train.{key}", value, value >= 1, "1 or more")
        if self.grad_accum_steps > self.batch_size:
            raise UserError(
                f"train.grad_accum_steps is {self.grad_accum_steps} and train.batch_size is {self.batch_size}: "
                "a batch cannot be split into more micro-batches than it has examples"
            )
        if self.compile and self.gradient_checkpointing:
            raise UserError(
                "train.compile and train.gradient_checkpointing are both true, but torch.compile decides itself what to "
                "recompute: set one of them to false"
            )
        if self.frozen_dtype == "bfloat16" and self.precision != "bf16":
            raise UserError(
                f"train.frozen_dtype is bfloat16 and train.precision is {self.precision}: expected precision bf16, whose "
                "autocast rounds the weights to bfloat16 anyway"
            )
        size = self.micro_batch_size
        _check("train.micro_batch_size", size, not isinstance(size, int) or size >= 1, "1 or more, auto, or null")
        if size is not None and self.grad_accum_steps > 1:
            raise UserError(
                f"train.micro_batch_size is {size} and train.grad_accum_steps is {self.grad_accum_steps}, but one of "
                "them splits the batch: set micro_batch_size to null, or grad_accum_steps to 1"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoint interval, retention and selection of the best epoch."""

    every: str | None = "1 epoch"
    """Checkpoint interval: '100 steps', '1 epoch', '10%', '10 min' or '2 h'; null saves only at the end, when stopped and at best epochs."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Best epoch: save a checkpoint at each new best epoch, and keep that of the best."""
    select_by: Literal["accuracy", "balanced_accuracy", "f1_macro", "log_loss"] = "accuracy"
    """Metric that selects the best epoch on the validation split, and counts for early stopping; ties go to the lower log loss."""
    keep_every: str | None = None
    """Permanent checkpoints: keep those at multiples of '10 epochs' or '1000 steps'; null keeps none permanently."""

    def __post_init__(self) -> None:
        _check("checkpoint.keep_last", self.keep_last, self.keep_last >= 1, "1 or more")
        if self.every is not None:
            parse_interval("checkpoint.every", self.every)
        if self.keep_every is not None:
            interval = parse_interval("checkpoint.keep_every", self.keep_every)
            expected = "steps, epochs or a percentage, not a time"
            _check("checkpoint.keep_every", repr(self.keep_every), interval.training is not None, expected)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining of a model of your own before fine-tuning."""

    root: str | None = None
    """Dataset for pretraining, in the forms of data.root; null skips pretraining and uses model.weights."""
    epochs: int = 10
    """Epochs of pretraining."""
    lr: float = 0.05
    """Learning rate of all layers in pretraining at its peak."""

    def __post_init__(self) -> None:
        _check("pretrain.epochs", self.epochs, self.epochs >= 1, "1 or more")
        _check("pretrain.lr", self.lr, _is_positive(self.lr), "a number above 0")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Comparison with the same network trained from scratch."""

    lr: float | None = None
    """Learning rate of all layers of the baseline; null skips the baseline."""

    def __post_init__(self) -> None:
        _check("baseline.lr", self.lr, _is_positive(self.lr), "a number above 0, or null")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    debug: bool = False
    """Debug mode: run every step on a few batches in one process, and show shapes and times."""

    def __post_init__(self) -> None:
        transfer, has_weights = self.transfer, bool(self.pretrain.root or self.model.weights)
        if self.train.precision in ("fp16", "tf32") and self.run.device == "cpu":
            raise UserError(
                f"train.precision is {self.train.precision} and run.device is cpu: CPUs do not train in it; choose "
                "fp32, bf16 or auto"
            )
        if self.data.sampling == "balanced" and self.regularization.class_weights == "balanced":
            raise UserError(
                "data.sampling and regularization.class_weights are both balanced, which would correct the class "
                "frequencies twice: set data.sampling to shuffled, or class_weights to none"
            )
        if (self.regularization.mixup or self.regularization.cutmix) and self.train.batch_size == 1:
            raise UserError(
                "regularization.mixup and cutmix mix images of a batch, but train.batch_size is 1: set them to 0, or "
                "increase batch_size"
            )
        if self.pretrain.root and self.model.weights:
            raise UserError(
                f"pretrain.root is {self.pretrain.root} and model.weights is {self.model.weights}, but a run starts "
                "from one of them: set the other to null"
            )
        if not has_weights and self.model.head_init in ("source-labels", "linear-probe"):
            raise UserError(
                f"model.head_init is {self.model.head_init}, which needs pretrained weights: set model.weights or "
                "pretrain.root, or set head_init to xavier"
            )
        for option, value in (("l2_sp", transfer.l2_sp), ("wise_ft", transfer.wise_ft)):
            if value and not has_weights:
                raise UserError(
                    f"transfer.{option} is {value}, which needs pretrained weights: set model.weights or "
                    f"pretrain.root, or turn transfer.{option} off"
                )
        if self.baseline.lr and not has_weights:
            raise UserError(
                "baseline.lr compares fine-tuning with training from scratch, but this run trains from scratch: set "
                "model.weights or pretrain.root, or set baseline.lr to null"
            )
