"""From logits to answers."""

from pathlib import Path

import pytest
import torch

from regraft.contract import CONFIG, MODEL
from trainer.errors import UserError
from trainer.inference.answers import AnswerOptions, make_predictions, require_temperature, require_unknown_threshold
from trainer.model.file import load
from trainer.model.metadata import UnknownThreshold

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 0.4], [200.0, 100.0, 150.0]])
CLASSES = ("a", "b", "unknown")


def test_predictions_are_sorted_and_the_first_of_equal_logits_wins() -> None:
    predictions = make_predictions(LOGITS, CLASSES, AnswerOptions(topk=3))
    assert [p.labels for p in predictions] == [("a", "b", "unknown"), ("a", "b", "unknown"), ("a", "unknown", "b")]
    expected = LOGITS.softmax(1).sort(descending=True).values
    assert [p.scores for p in predictions] == [pytest.approx(row) for row in expected.tolist()]
    assert torch.equal(torch.tensor([p.scores for p in predictions]), expected), "the decimals are exact"
    assert [len(p.labels) for p in make_predictions(LOGITS, CLASSES, AnswerOptions(topk=9))] == [3, 3, 3]
    assert make_predictions(LOGITS[:0], CLASSES, AnswerOptions()) == []


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        (AnswerOptions(threshold=0.5), [False, True, False]),
        (AnswerOptions(threshold=0.5, temperature=4.0), [True, True, False]),
        (AnswerOptions(threshold=0.0), [False, False, False]),
        (AnswerOptions(threshold=UnknownThreshold(score="max_logit", threshold=1.0)), [False, True, False]),
        (AnswerOptions(threshold=UnknownThreshold(score="energy", threshold=2.4)), [False, True, False]),
        (AnswerOptions(threshold=UnknownThreshold(score="energy", threshold=2.5)), [True, True, False]),
    ],
    ids=str,
)
def test_below_the_threshold_the_answer_is_unknown(options: AnswerOptions, unknown: list[bool]) -> None:
    predictions = make_predictions(LOGITS, CLASSES, options)
    assert [p.is_unknown for p in predictions] == unknown
    assert [p.label for p in predictions] == ["unknown" if value else "a" for value in unknown]
    assert [p.labels[0] for p in predictions] == ["a"] * 3


def test_what_the_model_file_lacks_is_an_error_with_the_command_that_stores_it(
    model_file: Path, tmp_path: Path
) -> None:
    metadata = load(model_file).metadata
    run = tmp_path / "a run"
    run.mkdir()
    (run / CONFIG).touch()
    alone = tmp_path / "model.safetensors"
    for file, command in ((run / MODEL, f"regraft evaluate '{run}'"), (alone, f"regraft evaluate {alone} DATA")):
        with pytest.raises(UserError) as error:
            require_temperature(metadata, file)
        assert str(error.value).endswith(f"This command fits and stores one: {command} --calibrate --store")
        with pytest.raises(UserError) as error:
            require_unknown_threshold(metadata, file)
        assert f"{command} --unknown FOLDER --store." in str(error.value)
