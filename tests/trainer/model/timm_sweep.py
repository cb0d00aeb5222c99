"""Check what regraft does with a model of timm, without memory for its parameters."""

from collections import Counter, defaultdict
from collections.abc import Mapping

import timm

from trainer.errors import UserError
from trainer.model.blocks import analyze_blocks
from trainer.model.build import build, preset
from trainer.model.gradient_checkpointing import enable_gradient_checkpointing
from trainer.model.head import find_heads, replace_head, trial_forward
from trainer.model.timm_models import construct_empty
from trainer.transfer.linear_probe import require_linear

CLASSES = 7


def check_model(name: str) -> dict[str, str]:
    """Return what was found, for a table: size, output layers, blocks, and what is not possible.

    Raises:
        UserError: the model is refused, by its name.
        AssertionError: regraft builds another model than timm.

    """
    image_size = preset(name, None).image_size
    model = build(name, image_size=image_size, empty=True)
    heads = find_heads(model, image_size)
    names = [head.name for head in heads]
    before = dict(model.named_parameters())
    replace_head(model, heads, CLASSES, "torch")
    assert trial_forward(model, image_size).shape == (2, CLASSES)
    # The state dict is the one that timm alone expects for so many classes.
    expected = construct_empty(name, image_size, CLASSES).state_dict()
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    changed = {key for key, parameter in model.named_parameters() if before[key] is not parameter}
    assert changed == {f"{head}.{key}" for head in names for key, _ in model.get_submodule(head).named_parameters()}
    blocks = analyze_blocks(model, image_size).blocks
    assert sorted(p for block in blocks for p in block.parameters) == sorted(key for key, _ in model.named_parameters())
    last = [key for block in blocks[-1 - len(names) :] for key in block.parameters]
    assert all(any(key.startswith(f"{head}.") for key in last) for head in names), last
    found = {"px": str(image_size), "output layer": ", ".join(names), "blocks": str(len(blocks))}
    limits = []
    try:
        if len(names) > 1:
            raise UserError("several output layers")
        require_linear(model, names[0], image_size)
    except UserError:
        limits.append("linear probe")
    try:
        enable_gradient_checkpointing(model, [block.name for block in blocks], names)
    except UserError:
        limits.append("gradient checkpointing")
    return found | {"without": ", ".join(limits)}


def try_model(name: str) -> dict[str, str] | Exception:
    """Return what `check_model` returns or raises."""
    try:
        return check_model(name)
    except Exception as error:  # noqa: BLE001 (the table shows it)
        return error


def format_table(results: Mapping[str, dict[str, str] | Exception]) -> str:
    """Return a Markdown table with a row for each family, which is a module of timm, and a list of what is refused.

    Args:
        results: name of a model -> its result.

    """
    families: defaultdict[str, dict[str, dict[str, str] | Exception]] = defaultdict(dict)
    for name, result in results.items():
        families[timm.model_entrypoint(name).__module__.rpartition(".")[2]][name] = result
    lines = ["| family | models | work | output layer | not possible |", "| --- | --- | --- | --- | --- |"]
    for family, models in sorted(families.items()):
        works = [result for result in models.values() if not isinstance(result, Exception)]
        layers = dict.fromkeys(f"`{result['output layer']}`" for result in works)
        limits = Counter(limit for result in works for limit in filter(None, result["without"].split(", ")))
        of = {limit: "" if count == len(works) else f" ({count})" for limit, count in limits.items()}
        cells = (family, len(models), len(works), " or ".join(layers), ", ".join(f"{x}{n}" for x, n in of.items()))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    refused = {name: str(result) for name, result in results.items() if isinstance(result, Exception)}
    works = len(results) - len(refused)
    lines += ["", f"{works} of {len(results)} work ({works / len(results):.1%}). Refused:", ""]
    return "\n".join([*lines, *(f"- `{name}`: {reason.splitlines()[0][:200]}" for name, reason in refused.items())])
