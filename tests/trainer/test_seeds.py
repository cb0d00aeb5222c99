from trainer.seeds import derive_seed


def test_seeds_differ_by_purpose_and_by_every_number() -> None:
    seeds = {
        derive_seed(purpose, *numbers)
        for purpose in ("crop", "order")
        for numbers in ((0,), (1,), (0, 0), (0, 1), (1, 0), (2**63, 5))
    }
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_never_change() -> None:
    # Data, order and crops of every run depend on them.
    assert derive_seed("crop", 0, 1, 2) == 8610339516575825867
    assert derive_seed("order", 3, 0) == 2627701694209701313
