"""Suggest the right option for a wrong one: a misspelled name, or the name that another program has for it."""

import difflib
from collections.abc import Sequence

_OTHER_NAMES = {
    "data.root": ("data", "dataset", "data_dir", "data_path", "data_root", "root", "train_data", "folder", "path"),
    "data.image_size": ("img_size", "imgsz", "img", "input_size", "crop_size", "size", "resolution"),
    "data.num_workers": ("workers", "num_workers", "dataloader_num_workers", "j"),
    "data.val_fraction": ("val_split", "validation_split", "val_ratio", "val_size", "val_percent", "valid_pct"),
    "data.test_fraction": ("test_split", "test_size", "test_ratio"),
    "model.name": (
        "model",
        "arch",
        "architecture",
        "backbone",
        "net",
        "network",
        "model_name",
        "model_name_or_path",
        "a",
    ),
    "model.weights": ("weights", "pretrained", "checkpoint_path", "ckpt", "ckpt_path", "init"),
    "model.dropout": ("drop", "dropout", "drop_rate"),
    "optim.name": ("optimizer", "optim", "opt"),
    "optim.lr": ("lr", "learning_rate", "base_lr", "lr0"),
    "optim.weight_decay": ("weight_decay", "wd", "decay"),
    "optim.schedule": ("scheduler", "sched", "lr_scheduler", "lr_scheduler_type", "schedule"),
    "optim.warmup": ("warmup", "warmup_steps", "warmup_epochs", "warmup_ratio", "lr_warmup_epochs"),
    "optim.max_grad_norm": ("clip_grad", "gradient_clip_val", "clip_grad_norm", "max_grad_norm"),
    "train.epochs": ("epochs", "epoch", "num_epochs", "max_epochs", "num_train_epochs", "n_epochs"),
    "train.batch_size": (
        "batch_size",
        "batch",
        "bs",
        "b",
        "batchsize",
        "train_batch_size",
        "per_device_train_batch_size",
    ),
    "train.grad_accum_steps": (
        "gradient_accumulation_steps",
        "accumulate_grad_batches",
        "accum_steps",
        "accum",
        "accumulate",
    ),
    "train.precision": ("precision", "amp", "fp16", "bf16", "mixed_precision"),
    "run.dir": (
        "output",
        "output_dir",
        "out",
        "out_dir",
        "save_dir",
        "log_dir",
        "logdir",
        "work_dir",
        "run",
        "name",
        "exp_name",
        "run_name",
        "experiment",
        "exp",
        "project",
        "o",
    ),
    "run.seed": ("seed", "random_seed"),
    "run.resume": ("resume", "resume_from_checkpoint", "auto_resume"),
    "run.device": ("device", "cuda", "cpu", "gpu", "no_cuda"),
    "transfer.strategy": ("strategy", "transfer", "recipe"),
    "transfer.trainable": ("freeze", "unfreeze", "trainable", "freeze_backbone", "linear_probe"),
    "regularization.ema": ("ema", "model_ema", "ema_decay", "model_ema_decay"),
    "regularization.label_smoothing": ("smoothing", "label_smoothing", "label_smoothing_factor"),
    "regularization.early_stopping": ("patience", "early_stopping", "early_stop", "early_stopping_patience"),
    "checkpoint.every": ("save_steps", "save_every", "save_freq", "checkpoint", "save_strategy"),
}
"""Option -> its names in other programs (torchvision's references, timm, transformers, Lightning), and short ones."""
_OPTION_OF = {name: option for option, names in _OTHER_NAMES.items() for name in names}
_NEAR = 5


def suggest(key: str, options: Sequence[str]) -> list[str]:
    """Return the options that `key` may stand for, the likeliest first; at most 5.

    Args:
        key: a name that is not an option, without its dashes.
        options: names of all options.

    """
    key = key.lower().strip("-").replace("-", "_")
    name = key.rpartition(".")[2]
    last_names = {option: option.rpartition(".")[2] for option in options}
    of_section = [option for option in options if option.startswith(key.partition(".")[0] + ".")] if "." in key else []
    candidates = [
        *(option for option in options if option == key),
        *difflib.get_close_matches(key, of_section, n=2, cutoff=0.75),
        *(option for option in options if option == _OPTION_OF.get(name)),
        *(option for option in options if last_names[option] == name),
        *difflib.get_close_matches(key, options, n=_NEAR),
        *(option for option in options if last_names[option] in difflib.get_close_matches(name, last_names.values())),
        *(option for option in options if option.startswith(f"{key}.")),
    ]
    return list(dict.fromkeys(candidates))[:_NEAR]
