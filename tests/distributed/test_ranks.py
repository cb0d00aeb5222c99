"""What 1, 2 and 3 real processes compute: the same updates, counts, output layers, and results of commands."""

import pytest
import torch

from tests.distributed.conftest import RankResults

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [2, 3])
def test_main_process_first_and_errors_on_all_ranks(processes: int, rank_results: RankResults) -> None:
    results = [result["main_process_first"] for result in rank_results(processes)]
    assert [result["existed"] for result in results] == [rank > 0 for rank in range(processes)]
    for result in results:
        assert result["errors"] == [f"rank {rank} has failed" for rank in range(processes)]


def test_collectives_return_the_same_on_every_rank(rank_results: RankResults) -> None:
    for result in rank_results(3):
        assert result["collectives"] == {
            "max": [2, 2, 3],
            "max of floats": [2.25, -0.1],
            "broadcast": {"rank": 0},
            "rows": [[0.0, 0, 0], [0.2, 2, 2], [0.4, 4, 4]],
            "restored": [[0.0, 0, 0], [0.2, 2, 2], [0.4, 4, 4]],
            "of more processes": [2.0, 4, 8],
            "nonfinite": 6,
        }


@pytest.mark.parametrize("processes", [2, 3])
def test_batch_norm_statistics_are_averaged_and_restored_per_rank(processes: int, rank_results: RankResults) -> None:
    results = [result["batch_norm"] for result in rank_results(processes)]
    mean = torch.tensor([result["local"][0] for result in results]).mean(0).tolist()
    keys = ("running_mean", "running_var", "num_batches_tracked")
    for result in results:
        assert result["averaged"][0] == pytest.approx(mean, rel=1e-6)
        assert result["averaged"][:2] == results[0]["averaged"][:2]
        assert result["restored"][:2] == result["local"][:2] != result["averaged"][:2]
        assert all(result[name][2] == result["local"][2] for name in ("averaged", "restored")), "it is frozen"
        assert result["gathered"] == sorted(f"{r}.{n}.{k}" for r in range(processes) for n in (0, 1) for k in keys)
    assert results[0]["local"] != results[1]["local"]


@pytest.mark.parametrize("processes", [2, 3])
def test_every_example_is_evaluated_once(processes: int, rank_results: RankResults) -> None:
    alone = rank_results(1)[0]["evaluation"]
    results = [result["evaluation"] for result in rank_results(processes)]
    assert sorted(example for result in results for example in result["examples"]) == list(range(7))
    assert [result["gathered"] for result in results] == [alone["gathered"], *[None] * (processes - 1)]
    assert alone["gathered"][0], "the logits of all examples, in order"
    for result in results:
        assert result["counts"] == alone["counts"]
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert result["interrupted"] == [True, True], "all ranks stop at the second batch, in train mode again"


def test_every_rank_starts_with_the_same_output_layer(rank_results: RankResults) -> None:
    alone = rank_results(1)[0]["heads"]
    results = [result["heads"] for result in rank_results(2)]
    for result in results:
        assert result["source-labels"] == alone["source-labels"]
        for count in ("of 7", "of 1"):
            assert result[count]["model"] == results[0][count]["model"], "bit for bit"
            # Features of other batches are rounded differently, which moves the solution a little.
            actual, expected = (torch.tensor(one[count]["logits"]).softmax(1) for one in (result, alone))
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-2)
        assert "features 7 x 512 in" in result["of 7"]["message"]
        assert "by default: no class has a second image" in result["of 1"]["message"]
        assert "the model's logits are not those of classifier.1" in result["refused"]


@pytest.mark.parametrize("processes", [2, 3])
def test_training_on_features_of_frozen_layers_changes_no_loss(processes: int, rank_results: RankResults) -> None:
    expected = rank_results(1)[0]["cached_features"]
    for result in rank_results(processes):
        assert result["cached_features"] == pytest.approx(expected, rel=1e-5)


def test_the_dtype_of_frozen_weights_changes_no_loss(rank_results: RankResults) -> None:
    for result in rank_results(2):
        expected, losses = result["frozen_dtype"]
        epoch = len(losses) // 2
        assert losses[:epoch] == expected[:epoch], "autocast rounds the weights to the same values"
        assert losses == pytest.approx(expected, rel=1e-2)  # layers that are unfrozen start from rounded weights


def test_early_stopping_ends_the_run_on_every_rank(rank_results: RankResults) -> None:
    for result in rank_results(2):
        # Of equal results the fine-tuned weights' is taken. A second start reports the finished run.
        assert result["early_stopping"] == {
            "codes": [0, 0], "attempts": [["done", 6, 6, 2, 2]] * 2, "alpha": 1.0, "epochs": 2,
            "equal": {"val": True, "test": True},  # the evaluation of the model file and that of its epoch
        }  # fmt: skip


def test_a_compiled_model_makes_the_same_updates(rank_results: RankResults) -> None:
    plain, compiled = rank_results(2)[0]["compiled"]
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_lr_find_is_the_same_on_two_processes_and_ends_at_the_same_update(rank_results: RankResults) -> None:
    alone, first, second = (r["commands"] for r in (*rank_results(1), *rank_results(2)))
    for key in ("losses", "steps", "diverged", "suggested"):
        assert first[key] == second[key], "if the ranks differed, one might stop without the other"
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert [first["diverged"], alone["diverged"]] == [True, True]
    assert abs(first["steps"] - alone["steps"]) <= 1, "a diverging loss amplifies rounding"


def test_compare_is_the_same_on_two_processes_and_reports_failed_runs(rank_results: RankResults) -> None:
    alone, first, second = (r["commands"] for r in (*rank_results(1), *rank_results(2)))
    for result in (alone, first):
        fine, failed, other = result["failures"]
        assert (fine, other) == ([], [])
        assert "training has diverged" in failed[0]
        assert result["accuracies"][0] == result["accuracies"][1], "the second comparison finds finished runs"
    assert second["accuracies"] == [None, None], "rank 0 alone has the results"
    for row, expected in zip(first["epochs"], alone["epochs"], strict=True):
        for key in ("train_loss", "test_loss"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4)
        assert (row["train_seen"], row["test_seen"]) == (22, 7)
