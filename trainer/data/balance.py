"""Balanced sampling: an epoch of as many examples of each class, however many there are (He and Garcia 2009, 3.1)."""

import torch
from torch import Tensor


def balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the draws of an epoch: int64 [N] positions in `labels`, int64 [N].

    Each of the C classes that have examples gets N / C draws, and where that leaves a remainder some get one
    more. Within a class all examples come equally often, but for one time more or less. Which ones is drawn anew
    by each call, as is the order of all.
    """
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    draws = torch.full_like(counts, len(labels) // len(counts))
    draws[torch.randperm(len(counts), generator=generator)[: len(labels) % len(counts)]] += 1
    parts = []
    for members, wanted in zip(
        labels.argsort(stable=True).split(counts.tolist()), draws.tolist(), strict=True
    ):
        times, rest = divmod(wanted, len(members))
        some = torch.randperm(len(members), generator=generator)[:rest]
        parts += [members.repeat(times), members[some]]
    return torch.cat(parts)[torch.randperm(len(labels), generator=generator)]


def repeated(draws: Tensor) -> Tensor:
    """Return how often each of int64 [N] draws has come before in them, int64 [N]."""
    values, places = draws.sort(stable=True)
    times = torch.empty_like(draws)
    times[places] = torch.arange(len(draws)) - torch.searchsorted(values, values)
    return times
