from trainer.commands.debug import verdict


def test_the_verdict_says_whether_the_loss_goes_down() -> None:
    assert "it goes down" in verdict([1.0, 0.9, 0.5])
    for losses in ([1.0, 1.0, 0.99], [1.0, 3.0, 9.0], [1.0, float("nan")]):
        assert "does NOT go down" in verdict(losses)
        assert "optim.lr" in verdict(losses)
