"""Class-balanced sampling: an epoch has equally many examples of each class (He and Garcia 2009, section 3.1)."""

import torch
from torch import Tensor


def balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the examples of an epoch, int64 [N], for labels int64 [N].

    Each of the C classes with examples gets N / C samples; for a remainder, random classes get one more.
    Within a class, the counts of two examples differ by at most one. The selection and the order are random.
    """
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    quotas = torch.full_like(counts, len(labels) // len(counts))
    quotas[torch.randperm(len(counts), generator=generator)[: len(labels) % len(counts)]] += 1
    parts = []
    for members, count in zip(labels.argsort(stable=True).split(counts.tolist()), quotas.tolist(), strict=True):
        times, rest = divmod(count, len(members))
        extra = torch.randperm(len(members), generator=generator)[:rest]
        parts += [members.repeat(times), members[extra]]
    return torch.cat(parts)[torch.randperm(len(labels), generator=generator)]


def repeated(examples: Tensor) -> Tensor:
    """Return how often each example in int64 [N] occurs at an earlier position: int64 [N]."""
    values, positions = examples.sort(stable=True)
    times = torch.empty_like(examples)
    times[positions] = torch.arange(len(examples)) - torch.searchsorted(values, values)
    return times
