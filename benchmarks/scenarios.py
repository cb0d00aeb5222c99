"""The speed bars: for each scenario, pairs of programs, what is compared, and the ratio that is asked for."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import REPOSITORY, Program, Result, default_workers

METRICS: dict[str, Callable[[Result, Result], float]] = {
    "training": lambda ours, other: ours.later / other.later,
    "first epoch": lambda ours, other: other.cold / ours.cold,
    "work": lambda ours, other: other.work / ours.work,
    "command": lambda ours, other: other.seconds / ours.seconds,
}
"""Speed of ours over that of the other: by images per second from the second epoch on; by the time from the end of the
imports to the end without the training of the later epochs; by all of that time; by the time of the whole command."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A ratio that is asked for."""

    scenario: str
    ours: Program
    other: Program
    metric: str
    asked: float
    """The least ratio; above 1, ours is faster."""

    def ratios(self, ours: list[Result], other: list[Result]) -> list[float]:
        """Return the ratio of each round."""
        return [METRICS[self.metric](a, b) for a, b in zip(ours, other, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the command line decides about all scenarios."""

    threads: int
    epochs: int
    batch_size: int
    lr: float
    weights: Path | None
    """SqueezeNet's ImageNet weights, for `hymenoptera`."""
    peers: tuple[str, ...]
    """The programs that are installed."""

    def program(self, name: str) -> Program:
        """Return a program that trains as its documentation says."""
        precision = {"d2l_loop": "fp32"}.get(name, "default")
        return Program(
            name=name,
            precision=precision,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            workers=default_workers(name, self.threads),
            threads=self.threads,
        )


def d2l(setting: Setting) -> Iterator[Bar]:
    """Compare the default settings with the D2L loop in fp32."""
    ours, other = setting.program("regraft"), setting.program("d2l_loop")
    yield Bar(scenario="d2l", ours=ours, other=other, metric="training", asked=2.4)


def timm(setting: Setting) -> Iterator[Bar]:
    """Compare the default settings with timm, tuned."""
    for model in ("resnet18", "mobilenet_v3_small"):
        ours, other = (replace(setting.program(name), model=model) for name in ("regraft", "timm_train"))
        yield Bar(scenario="timm", ours=ours, other=other, metric="training", asked=1.10)


def first_epoch(setting: Setting) -> Iterator[Bar]:
    """Compare the first epoch with cold caches, all that is done before it included, with timm, tuned."""
    ours, other = setting.program("regraft"), setting.program("timm_train")
    yield Bar(scenario="first_epoch", ours=ours, other=other, metric="first epoch", asked=1.0)


def equal_arithmetic(setting: Setting) -> Iterator[Bar]:
    """Compare with every peer in fp32, in channels_last, and with the same updates."""
    for name in setting.peers:
        ours, other = (
            replace(setting.program(program), precision="fp32", layout="channels_last") for program in ("regraft", name)
        )
        yield Bar(scenario="equal_arithmetic", ours=ours, other=other, metric="training", asked=1.0)


def layer4(setting: Setting) -> Iterator[Bar]:
    """Compare training of the last stage with full fine-tuning by the D2L loop."""
    ours, other = replace(setting.program("regraft"), trainable="last"), setting.program("d2l_loop")
    yield Bar(scenario="layer4", ours=ours, other=other, metric="training", asked=5.0)


def head_only(setting: Setting) -> Iterator[Bar]:
    """Compare training of the head with full fine-tuning by the D2L loop."""
    ours, other = replace(setting.program("regraft"), trainable="head"), setting.program("d2l_loop")
    yield Bar(scenario="head_only", ours=ours, other=other, metric="training", asked=5.0)


def fixed_views(setting: Setting) -> Iterator[Bar]:
    """Compare ten epochs of the head on fixed views with a peer's ten epochs with a frozen backbone."""
    for name in ("timm_train", "d2l_loop"):
        ours, other = (
            replace(setting.program(program), trainable="head", fixed_views=True, epochs=10)
            for program in ("regraft", name)
        )
        yield Bar(scenario="fixed_views", ours=ours, other=other, metric="work", asked=15.0)


def hymenoptera(setting: Setting) -> Iterator[Bar]:
    """Compare the recipe for ants and bees, from command to end, with the D2L loop as a script."""
    ours, other = (
        replace(
            setting.program(name),
            config=REPOSITORY / "configs" / "hymenoptera.yaml" if name == "regraft" else None,
            model="squeezenet1_1",
            weights=setting.weights,
            epochs=5,
            batch_size=128,
            lr=5e-6,
            reduction="sum",
        )
        for name in ("regraft", "d2l_loop")
    )
    yield Bar(scenario="hymenoptera", ours=ours, other=other, metric="command", asked=2.5)


def two_ranks(setting: Setting) -> Iterator[Bar]:
    """Compare two gloo ranks of half the threads with one process, at an equal global batch."""
    other = setting.program("regraft")
    ours = replace(other, ranks=2, threads=max(1, setting.threads // 2))
    yield Bar(scenario="two_ranks", ours=ours, other=other, metric="training", asked=0.95)


def resident(setting: Setting) -> Iterator[Bar]:
    """Compare training from JPEG files, after the first epoch, with the model alone on a batch in memory."""
    for model in ("resnet18", "squeezenet1_1", "mobilenet_v3_small"):
        for precision in ("fp32", "bf16"):
            ours, other = (
                replace(setting.program(name), model=model, precision=precision, layout="channels_last")
                for name in ("regraft", "resident_batch")
            )
            yield Bar(scenario="resident", ours=ours, other=other, metric="training", asked=0.97)


SCENARIOS: dict[str, Callable[[Setting], Iterable[Bar]]] = {
    function.__name__: function
    for function in (
        *(d2l, timm, first_epoch, equal_arithmetic, layer4, head_only),
        *(fixed_views, hymenoptera, two_ranks, resident),
    )
}
