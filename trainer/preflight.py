"""What can be said of a run before any of its long work: an error that comes here costs nobody an hour, or a queue."""

from dataclasses import replace

from trainer.assemble import (
    make_groups,
    make_model,
    make_order,
    make_plan,
    require_selection,
    require_synchronisable,
)
from trainer.config import Config, ScratchConfig
from trainer.data.index import ImageIndex
from trainer.linear_probe import require_linear
from trainer.model.source_labels import check_targets
from trainer.runtime import Runtime


def preflight(config: Config, index: ImageIndex, machine: Runtime | None = None) -> None:
    """Raise a UserError for what the run would end with before its first step, whatever its source model will be.

    Args:
        config: the whole of it, resolved.
        index: the images to fine-tune on.
        machine: what the run runs on; None: it will run elsewhere, and what depends on that is left.

    """
    order = make_order(config, index)
    if machine is not None:
        require_synchronisable(config, order, machine)
    require_selection(config, index)
    make_plan(config, order)
    if config.model.head_init == "source-labels":
        check_targets(config.model.aliases, index.classes)
    created = make_model(without_weights(config), index.classes, None, on_progress=lambda _: None)
    if config.model.head_init == "linear-probe":
        require_linear(created.model, created.heads[0], config.data.image_size)  # type: ignore[arg-type]
    make_groups(created, config)


def without_weights(config: Config) -> Config:
    """Return a config whose model is of the same design, with drawn weights: nothing has to be fetched for it."""
    return replace(
        config,
        model=replace(config.model, weights=None, head_init="xavier"),
        transfer=replace(config.transfer, l2_sp=0.0, wise_ft=False),
        scratch=ScratchConfig(),
    )
