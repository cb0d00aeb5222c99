"""Section `data`: dataset, preprocessing and augmentation."""

from dataclasses import dataclass, field
from typing import Literal

from trainer.config.sections.values import MAX_SEED, check_value
from trainer.data.csv.columns import ROLES as CSV_ROLES
from trainer.data.group_by import check_pattern
from trainer.data.preprocessing import find_wrong_normalization
from trainer.errors import UserError


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
            check_value(f"data.{key}", repr(path), path is None or bool(path.strip()), f"a {kind}, or null")
        if self.group_by is not None:
            check_pattern("data.group_by", self.group_by)
            if "group" in self.csv_columns:
                raise UserError("data.group_by and the group of data.csv_columns are both set: set one of them")
        for key in ("image_size", "resize_size", "cache_resize"):
            size: int | None = getattr(self, key)
            check_value(f"data.{key}", size, size is None or 1 <= size <= 8192, "1 to 8192 pixels, or null")
        if reason := find_wrong_normalization(self.mean, self.std):
            raise UserError(f"data.{reason}")
        if (self.mean is None) != (self.std is None):
            raise UserError("data.mean and data.std belong together: set both or neither")
        check_value("data.random_erasing", self.random_erasing, 0 <= self.random_erasing <= 1, "a probability, 0 to 1")
        check_value("data.views", self.views, self.views is None or self.views >= 1, "1 or more, or null")
        if self.cache_images == "device" and (self.augment, self.random_erasing) != ("none", 0.0):
            augment = f"{self.augment} with data.random_erasing {self.random_erasing}"
            expected = "basic, or none without random erasing, if data.cache_images is device"
            check_value("data.augment", augment, self.augment == "basic", expected)
        low, high = self.crop_scale
        check_value("data.crop_scale", self.crop_scale, 0 < low <= high <= 1, "0 < smallest <= largest <= 1")
        for key in ("val_fraction", "test_fraction"):
            fraction: float = getattr(self, key)
            check_value(f"data.{key}", fraction, 0 <= fraction < 1, "a fraction from 0 to below 1")
        check_value("data.seed", self.seed, 0 <= self.seed <= MAX_SEED, "0 to 2^63 - 1")
        workers = self.num_workers
        check_value("data.num_workers", workers, workers is None or workers >= 0, "0 or more, or null")
        wrong = [text for text in self.extensions if not (text.startswith(".") and len(text) > 1)]
        if wrong:
            raise UserError(
                f"data.extensions contains {wrong}: expected extensions with a dot, such as ['.jpg', '.gif']"
            )
