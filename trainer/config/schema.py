"""What a run is: frozen dataclasses, filled from defaults < YAML (`--config`) < `--section.key value`.

Rules that one value breaks alone, or two break together, stand in `__post_init__`; the texts under the
fields are the program's `--help`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import UserError
from trainer.optim.schedule import parse_duration, parse_interval


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise UserError(text)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and on what it runs."""

    dir: str = "runs/default"
    """Folder of everything that the run writes."""
    seed: int = 0
    """Seed of the initialisation, the order of the examples, their crops and flips."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the run folder's newest checkpoint, or start; never: start, an earlier run is moved aside; must: go on, or stop."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int | None = None
    """CPU threads of each process; null: the cores available here divided among this machine's processes (half of them beside a GPU)."""
    hang_timeout: float | Literal["auto"] | None = "auto"
    """Seconds without a step after which every process writes its stacks to hangs/ and ends with exit code 1. auto: 10 times the longest interval between two steps so far (but the first), at least 5 min; at least 30 min for the first 10 and where a checkpoint is written. A number holds everywhere; null: never."""

    audit: bool = False
    """Write, for every update, which examples each process saw, checksums of their pixels and the learning rate to audit/: to compare runs."""

    def __post_init__(self) -> None:
        _require(bool(self.dir.strip()), "run.dir is empty: give the folder that the run may write to")
        _require(0 <= self.seed < 2**63, f"run.seed is {self.seed}: expected 0 to 2^63 - 1")
        _require(
            self.threads is None or self.threads >= 1,
            f"run.threads is {self.threads}: expected 1 or more, or null",
        )
        _require(
            not isinstance(self.hang_timeout, int | float) or 0 < self.hang_timeout <= 1e6,
            f"run.hang_timeout is {self.hang_timeout}: expected seconds (above 0, up to 1,000,000), auto, or null",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and how they become the model's input."""

    root: str | None = None
    """A folder with train/ and val/ or test/, a folder of one folder per class, a CSV (path,label,split), or a known name: hotdog, synthetic-source, synthetic-target."""
    image_size: int | None = None
    """Side of the square that the model sees [pixels]; null: that of the weights."""
    resize_size: int | None = None
    """Size to which test images are resized before the central crop [pixels]; null: that of the weights, in proportion to image_size."""
    resize: Literal["squash", "shorter"] | None = None
    """Test images: squash both sides to resize_size (the note), or bring the shorter side to it and keep the proportions; null: as a model file of regraft says, else squash."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Resampling of every resize; null: that of the weights."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue in [0, 1] that is subtracted; null: that of the weights."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue in [0, 1] that is divided by; null: that of the weights."""
    augment: Literal["basic", "none", "trivialaugment", "randaugment", "augmix"] = "basic"
    """Training images: basic is RandomResizedCrop and a horizontal flip; none is the test transform; the others come on top of the recipe (torchvision v2)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the picture's area that a training crop covers."""
    random_erasing: float = 0.0
    """Probability with which a rectangle of a training image, 2 to 33% of it, is made the mean colour, after all else (Zhong et al. 2020); 0: never."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Examples of an epoch: shuffled, each of them once; balanced, as many in all but each class as often as the others (He and Garcia 2009), so that examples of small classes come several times, each time in another crop, and of large ones only some, others each epoch."""
    val_fraction: float = 0.0
    """Share of train/ cut out, by class and seed, to select the best epoch on; 0: none."""
    test_fraction: float = 0.2
    """Share held out for the test where the folder brings no val/ or test/ of its own."""
    seed: int = 0
    """Seed of the splits, and of the pictures of the synthetic data sets."""
    extensions: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    """File name endings taken for images, in any case; the others are passed over, counted and said."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """Images that cannot be read: stop before training and list them, or skip them, counted and listed."""
    num_workers: int | None = None
    """Processes that decode ahead, for each training process; null: by the cores available; 0: none, the training process decodes between its updates."""
    cache: str | None = None
    """Folder of downloads, drawn data sets and verdicts; null: $REGRAFT_CACHE, else ~/.cache/regraft."""

    def __post_init__(self) -> None:
        for key in ("image_size", "resize_size"):
            value = getattr(self, key)
            _require(
                value is None or 1 <= value <= 8192,
                f"data.{key} is {value}: expected 1 to 8192 pixels, or null",
            )
        _require(
            (self.mean is None) == (self.std is None),
            "data.mean and data.std go together: give both, or neither",
        )
        for key in ("mean", "std"):
            value = getattr(self, key)
            _require(
                value is None or all(map(math.isfinite, value)),
                f"data.{key} is {value}: expected three finite numbers",
            )
        _require(
            self.std is None or min(self.std) > 0, f"data.std is {self.std}: expected three numbers above 0"
        )
        _require(
            0 <= self.random_erasing <= 1,
            f"data.random_erasing is {self.random_erasing}: expected a probability, 0 to 1",
        )
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1, f"data.crop_scale is {self.crop_scale}: expected 0 < least <= greatest <= 1"
        )
        for key in ("val_fraction", "test_fraction"):
            value = getattr(self, key)
            _require(0 <= value < 1, f"data.{key} is {value}: expected a share from 0 to below 1")
        _require(0 <= self.seed < 2**63, f"data.seed is {self.seed}: expected 0 to 2^63 - 1")
        _require(
            self.num_workers is None or self.num_workers >= 0,
            f"data.num_workers is {self.num_workers}: expected 0 or more, or null",
        )
        wrong = [e for e in self.extensions if not (e.startswith(".") and len(e) > 1)]
        _require(
            not wrong,
            f"data.extensions holds {wrong}: expected endings with their dot, as in ['.jpg', '.gif']",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The source model, and the start of its new output layer."""

    name: str = "resnet18"
    """A classification model of torchvision."""
    weights: str | None = "DEFAULT"
    """A torchvision weights name (DEFAULT, IMAGENET1K_V1, ...), a .safetensors or .pth file, or null: from scratch."""
    head_init: Literal["xavier", "torch", "source-labels", "linear-probe"] = "xavier"
    """Start of the new output layer. xavier: Xavier-uniform weight (the bias keeps torch's default); torch: its default for both; source-labels: the source's own rows for classes that it knows by name, the others drawn; linear-probe: logistic regression on the features of one pass over the training images (LP-FT, Kumar et al. 2022)."""
    source_labels: str = "auto"
    """Names of the source's classes, for source-labels. auto: those of the weights (torchvision's, or what a model file of regraft says of itself; a file that names none but has as many outputs as torchvision's weights has their classes); else a text file, one name a line, in the order of the rows."""
    aliases: dict[str, str] = field(default_factory=dict)
    """For source-labels: class of yours -> class of the source, where their names differ, as in {dachshund puppy: dachshund}."""
    dropout: float | None = None
    """Probability of the model's dropout layers (not of attention weights, nor in auxiliary classifiers); null: as the model has it."""
    stochastic_depth: float | None = None
    """Probability with which the last residual block is left out (Huang et al. 2016), those before it less often, in proportion to their depth; null: as the model has it."""

    def __post_init__(self) -> None:
        for key in ("dropout", "stochastic_depth"):
            value = getattr(self, key)
            _require(
                value is None or 0 <= value < 1,
                f"model.{key} is {value}: expected 0 to below 1, or null",
            )
        _require(
            bool(self.source_labels.strip()),
            "model.source_labels is empty: expected auto, or a text file with a name a line",
        )


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """What of the source model changes."""

    strategy: str | None = None
    """A named combination of options (configs/strategies/NAME.yaml): d2l, head-only, lp-ft, gradual-unfreezing, strong-regularization, from-scratch, or a YAML file of one. What stands beside it, in the same file or on the command line, wins over it; null: none."""
    trainable: dict[int, str] | str = "all"
    """What trains: all; head; from:MODULE, that module and all that the forward pass comes to after it; last:N, the last N blocks, the output layer's among them; or names of modules and patterns of parameter names, as in 'layer4, *.bias'. New output layers always do. In stages: {0: head, 1: layer4, 3: all}, epoch -> what trains from there on, with all that did before."""
    batch_norm: Literal["frozen-with-weights", "frozen", "train", "sync"] = "frozen-with-weights"
    """BatchNorm layers. train: use and update the statistics of each process's share of the batch; frozen: use the source's stored ones and leave them as they are; frozen-with-weights: frozen where the layer's weights do not train, train elsewhere; sync: as that, with the statistics of the global batch (GPUs only)."""
    l2_sp: float = 0.0
    """Strength of the pull towards the source's weights (L2-SP, Li et al. 2018), in place of weight_decay on all but the new output layers, biases and norms among them; 0: none."""
    wise_ft: bool = False
    """After training, evaluate the line between the start and the fine-tuned weights (WiSE-FT, Wortsman et al. 2022) on the images to select on (val/, or data.val_fraction), and keep its best point."""

    def __post_init__(self) -> None:
        _require(0 <= self.l2_sp < math.inf, f"transfer.l2_sp is {self.l2_sp}: expected 0 or more")
        _require(
            self.trainable != "",
            "transfer.trainable is empty: expected all, head, from:MODULE, last:N, patterns, or stages",
        )
        if isinstance(self.trainable, dict):
            _require(
                min(self.trainable, default=-1) == 0,
                f"transfer.trainable is {self.trainable}: expected stages from epoch 0 on, as in {{0: head, 1: layer4, 3: all}}",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its parameter groups and its learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: float = 1e-3
    """Peak learning rate of every layer but the head. Under loss_reduction sum it belongs to the summed loss: divide a mean's by batch_size."""
    head_lr_scale: float = 10.0
    """The head's learning rate as a multiple of lr."""
    weight_decay: float = 1e-4
    """Added to the gradient times the weight (sgd), or decoupled from it (adamw)."""
    decay_norm_and_bias: bool = True
    """Weight decay on biases, norms and other parameters of one dimension too, as the note has it."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block to the one before it, from the head's down; 1: one rate for all."""
    lr_mult: dict[str, float] = field(default_factory=dict)
    """Pattern of parameter names, or module -> multiple of its learning rate, as in {layer1: 0.1}; of several that match the last one counts."""
    momentum: float = 0.9
    """Momentum; sgd only."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """What is differentiated: the mean, or the sum, of the loss over the examples of the global batch."""
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    """Learning rate after the warm-up: constant, or a half cosine down to 0 at the end. one-cycle (Smith 2018): up from a 25th by a half cosine, over the warm-up or 30% of the run where there is none, then down to nearly 0; the momentum stays."""
    warmup: str = "0 steps"
    """Length of the warm-up, linear but in one-cycle: '100 steps', '1 epochs' or '5%'."""
    max_grad_norm: float | None = None
    """Greatest norm of the whole gradient; null: not clipped."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, f"optim.lr is {self.lr}: expected a number above 0")
        _require(
            0 < self.head_lr_scale < math.inf,
            f"optim.head_lr_scale is {self.head_lr_scale}: expected a number above 0",
        )
        _require(
            0 <= self.weight_decay < math.inf,
            f"optim.weight_decay is {self.weight_decay}: expected 0 or more",
        )
        _require(
            0 < self.layer_decay <= 1, f"optim.layer_decay is {self.layer_decay}: expected above 0, up to 1"
        )
        wrong = {name: scale for name, scale in self.lr_mult.items() if not 0 < scale < math.inf}
        _require(
            not wrong,
            f"optim.lr_mult holds {wrong}: expected multiples above 0; transfer.trainable says what does not train",
        )
        _require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}: expected 0 to below 1")
        _require(
            self.max_grad_norm is None or 0 < self.max_grad_norm < math.inf,
            f"optim.max_grad_norm is {self.max_grad_norm}: expected a number above 0, or null",
        )
        parse_duration("optim.warmup", self.warmup)


@dataclass(frozen=True, kw_only=True)
class RegularizationConfig:
    """What keeps a model of many parameters from learning few examples by heart; beside data.augment, optim.weight_decay."""

    label_smoothing: float = 0.0
    """Share of each target that goes to all classes alike (Szegedy et al. 2016)."""
    mixup: float = 0.0
    """Alpha of the Beta distribution of mixup (Zhang et al. 2018), whose partners come from the global batch; 0: none."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution of CutMix (Yun et al. 2019), likewise; with mixup, each batch is the one or the other."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each example's loss in training: none, 1; balanced, N / (classes x examples of its class) (King and Zeng 2001), whose mean over the training set is 1."""
    ema: float | None = None
    """Decay per update of an exponential moving average of the weights (and BatchNorm's statistics), which is what is evaluated and kept; it starts lower, (1 + step) / (10 + step); null: none."""
    early_stopping: int | None = None
    """Epochs without a better one on the images to select on (val/, or data.val_fraction) after which training ends; null: never."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.label_smoothing < 1,
            f"regularization.label_smoothing is {self.label_smoothing}: expected 0 to below 1",
        )
        for key in ("mixup", "cutmix"):
            value = getattr(self, key)
            _require(0 <= value < math.inf, f"regularization.{key} is {value}: expected 0 or more")
        _require(
            self.ema is None or 0 < self.ema < 1,
            f"regularization.ema is {self.ema}: expected above 0 and below 1, or null",
        )
        _require(
            self.early_stopping is None or self.early_stopping >= 1,
            f"regularization.early_stopping is {self.early_stopping}: expected 1 epoch or more, or null",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, and in what precision."""

    epochs: int = 5
    """Passes over the training set."""
    batch_size: int = 32
    """Examples of one update, over all processes (the global batch)."""
    grad_accum_steps: int = 1
    """Parts into which each process cuts its share of a batch, one after the other, to save memory; the update stays the same."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward; auto: bf16 or fp16 on a GPU by what it can do, fp32 on a CPU."""
    channels_last: bool = True
    """Memory layout NHWC for images and convolutions; the results are the same but for rounding."""
    logs_per_epoch: int = 5
    """How often in an epoch figures are read from the device, shown and written."""

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "grad_accum_steps", "logs_per_epoch"):
            value = getattr(self, key)
            _require(value >= 1, f"train.{key} is {value}: expected 1 or more")
        _require(
            self.grad_accum_steps <= self.batch_size,
            f"train.grad_accum_steps is {self.grad_accum_steps}, train.batch_size {self.batch_size}: "
            "a batch cannot be cut into more parts than it has examples",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the training state is saved, and what of it is kept; at the end and when asked to stop it always is."""

    every: str | None = "1 epoch"
    """Interval between checkpoints: '100 steps', '1 epoch', '10%', '10 min', '2 h'; null: none but those, and the best epochs'."""
    keep_last: int = 2
    """How many of the newest are kept."""
    keep_best: bool = True
    """Save the epochs that are the best so far, and keep that of the best."""
    keep_every: str | None = None
    """Keep those at multiples of this for good: '10 epochs', '1000 steps'; null: none."""

    def __post_init__(self) -> None:
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}: expected 1 or more")
        if self.every is not None:
            parse_interval("checkpoint.every", self.every)
        if self.keep_every is not None:
            interval = parse_interval("checkpoint.keep_every", self.keep_every)
            _require(
                interval.training is not None,
                f"checkpoint.keep_every is {self.keep_every!r}: expected steps, epochs or a percentage, not a time",
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A source model of one's own, trained first (the note's first step)."""

    root: str | None = None
    """The source data set, as data.root; null: no such stage, the weights come from model.weights."""
    epochs: int = 10
    """Passes over the source training set."""
    lr: float = 0.05
    """Peak learning rate of every layer, the output layer included."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"pretrain.epochs is {self.epochs}: expected 1 or more")
        _require(0 < self.lr < math.inf, f"pretrain.lr is {self.lr}: expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The note's comparison: the same network from scratch under the same budget."""

    lr: float | None = None
    """Learning rate of every layer when training from scratch; null: no comparison."""

    def __post_init__(self) -> None:
        _require(
            self.lr is None or 0 < self.lr < math.inf,
            f"baseline.lr is {self.lr}: expected a number above 0, or null",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole."""

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
    """One process, no workers, a handful of batches: every stage shown with shapes and times, and whether one batch can be learnt by heart."""

    def __post_init__(self) -> None:
        _require(
            not (self.train.precision == "fp16" and self.run.device == "cpu"),
            "train.precision fp16 and run.device cpu do not go together: a CPU has no fp16 training; choose fp32 or bf16",
        )
        _require(
            not (self.data.sampling == "balanced" and self.regularization.class_weights == "balanced"),
            "data.sampling and regularization.class_weights are both balanced: small classes would count twice over. Set one "
            "of them, to shuffled or none",
        )
        _require(
            not (self.regularization.mixup or self.regularization.cutmix) or self.train.batch_size > 1,
            "regularization.mixup and cutmix mix the pictures of a batch, but train.batch_size is 1: set them to 0, or more "
            "examples a batch",
        )
        _require(
            not (self.pretrain.root and self.model.weights),
            f"pretrain.root ({self.pretrain.root}) and model.weights ({self.model.weights}) are two sources: set one of them to null",
        )
        _require(
            self.model.head_init in ("xavier", "torch") or bool(self.pretrain.root or self.model.weights),
            f"model.head_init is {self.model.head_init}, which takes it from a source model, but this run starts from "
            "scratch: set model.weights or pretrain.root, or head_init to xavier",
        )
        for option, asked in (("l2_sp", self.transfer.l2_sp), ("wise_ft", self.transfer.wise_ft)):
            _require(
                not asked or bool(self.pretrain.root or self.model.weights),
                f"transfer.{option} is {asked}, which leads back to a source model, but this run starts from scratch: "
                f"set model.weights or pretrain.root, or leave transfer.{option} out",
            )
        _require(
            not (self.baseline.lr and not (self.pretrain.root or self.model.weights)),
            "baseline.lr asks for a comparison with scratch, but this run starts from scratch itself: "
            "set model.weights or pretrain.root, or baseline.lr to null",
        )
