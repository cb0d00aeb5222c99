import pytest
import torch
from torch import Tensor, nn
from torchvision.models import GoogLeNetOutputs

from tests.trainer.training import Batches, make_net, make_train_step, same_tensors
from trainer.distributed.context import DistributedContext
from trainer.optim.loss import CROSS_ENTROPY, Criterion, MixedTarget
from trainer.optim.train_step import split_micro_batches
from trainer.transfer.l2_sp import L2SP


def test_clipping_limits_the_norm_of_the_whole_gradient(ctx: DistributedContext) -> None:
    net, initial = make_net(), make_net()
    train_step = make_train_step(ctx, loss_reduction="sum", max_grad_norm=1e-3)
    train_step(net, ctx.accelerator.prepare(torch.optim.SGD(net.parameters(), lr=1.0)), next(Batches()), 0, 4)
    moved = [(a - b).flatten() for a, b in zip(net.parameters(), initial.parameters(), strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_an_empty_local_batch_gives_every_parameter_a_gradient_of_zero(ctx: DistributedContext) -> None:
    net = make_net(batch_norm=True)
    before = make_net(batch_norm=True).state_dict()
    empty = (torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), torch.empty(0))
    loss_sum, correct = make_train_step(ctx).backward(net, empty, 1.0)
    assert (loss_sum.item(), correct.item()) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
    assert same_tensors(net.state_dict(), before)


def test_micro_batches_cover_a_batch_once_in_nearly_equal_parts() -> None:
    for size, count, lengths in ((7, 3, [2, 2, 3]), (2, 5, [1, 1]), (8, 4, [2] * 4), (0, 3, [0])):
        slices = split_micro_batches(size, count)
        assert [i for part in slices for i in range(size)[part]] == list(range(size))
        assert [part.stop - part.start for part in slices] == lengths


def test_micro_batches_have_at_most_micro_batch_size_images(
    ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, sizes = [], []
    for size in (None, 4, 3, 1):
        net = make_net()
        net.conv.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        make_train_step(ctx, micro_batch_size=size).backward(net, next(Batches()), 0.25)
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert sizes == [4, 4, 2, 2, 1, 1, 1, 1]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


class Auxiliary(nn.Module):
    """A model with GoogLeNet's outputs, from three separate layers."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.first, self.second = (nn.Linear(12, 4) for _ in range(3))

    def forward(self, images: Tensor) -> GoogLeNetOutputs:
        flat = images.flatten(1)
        return GoogLeNetOutputs(self.main(flat), self.second(flat), self.first(flat))


def test_auxiliary_outputs_have_the_same_loss_and_only_the_main_loss_is_reported(ctx: DistributedContext) -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(5, 3, 2, 2, generator=generator)
    labels, others = torch.randint(4, (2, 5), generator=generator)
    criterion = Criterion(label_smoothing=0.2, class_weights=torch.tensor([0.5, 2.0, 1.0, 3.0]))
    mixed = MixedTarget(others, 0.4)
    model = Auxiliary()
    train_step = make_train_step(ctx, criterion=criterion, grad_accum_steps=2, normalize=torch.clone)
    loss_sum, correct = train_step.backward(model, (images, labels, labels), 1.0, mixed)
    flat = images.flatten(1)
    for layer, weight in ((model.main, 1.0), (model.first, 0.3), (model.second, 0.3)):
        loss = criterion(layer(flat), labels, mixed)
        (expected,) = torch.autograd.grad(weight * loss, layer.weight)
        torch.testing.assert_close(layer.weight.grad, expected)
    logits = model.main(flat)
    assert loss_sum.item() == pytest.approx(criterion(logits, labels, mixed).item())
    assert correct.item() == (logits.argmax(1) == labels).sum().item()


def test_a_plain_update_has_cross_entropy_alone(ctx: DistributedContext) -> None:
    l2_sp = L2SP(make_net().parameters(), 0.1, decoupled=False)
    criterion = Criterion(label_smoothing=0.2)
    plain = make_train_step(ctx, criterion=criterion, mixup=(0.3, 1.0), l2_sp=l2_sp, max_grad_norm=0.5).plain()
    assert plain.criterion is CROSS_ENTROPY
    assert (plain.mixup.enabled, plain.l2_sp.enabled, plain.max_grad_norm) == (False, False, 0.5)
