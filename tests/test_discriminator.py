"""Discriminator: sizes, spectral norms, hinge loss and gradient penalty by hand and by autograd, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlarft.nets.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    SpectralConv2d,
    gradient_penalty,
    hinge_loss,
)


def make(channels: tuple[int, ...] = (8, 12, 16)) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(DiscriminatorConfig(channels), 3, (32, 32))


def test_paper_preset_size():
    net = Discriminator(DiscriminatorConfig(), 3, (256, 256))
    assert net(torch.rand(1, 3, 256, 256)).shape == (1, 1, 4, 4)
    kernels = 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 2 * 512 * 512)
    assert sum(p.numel() for p in net.parameters()) == kernels + 64 + 513


def test_spectral_norm_against_svd():
    torch.manual_seed(0)
    conv = SpectralConv2d(3, 8, 3, stride=2, padding=1)
    with torch.no_grad():
        conv.weight.mul_(7)
    for _ in range(100):
        conv.power_iteration()
    x = torch.randn(2, 3, 8, 8)
    norm = torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2)
    assert_close(conv(x), F.conv2d(x, conv.weight / norm, conv.bias, stride=2, padding=1))


def test_losses_call_the_network_without_changing_it():
    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    true, decoded = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    loss = net.loss(true, decoded, 10.0)[0]
    net.generator_loss(decoded)
    assert_close(net.loss(true, decoded, 10.0)[0], loss, rtol=0, atol=0)
    halves = [net.loss(true[i : i + 2], decoded[i : i + 2], 10.0)[0] for i in (0, 2)]
    assert_close(sum(halves) / 2, loss)  # so that batches may be split
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        net.convs[0].weight.add_(torch.randn_like(net.convs[0].weight))
    net.refresh()
    assert not torch.equal(net.convs[0].left, before["convs.0.left"])


def test_hinge_loss_by_hand():
    true, decoded = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 1.0])
    assert_close(hinge_loss(true, decoded), torch.tensor((0 + 0.5 + 2) / 3 + (0 + 2) / 2))


def test_gradient_penalty_of_a_linear_discriminator():
    weight = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = torch.rand(5, 3, 4, 4, requires_grad=True)
    logits = F.conv2d(images, weight)  # (5, 1, 1, 1): the slope is the weight, whatever the image
    penalty = gradient_penalty(logits, images)
    norm = weight.detach().norm()
    assert_close(penalty, (norm - 1) ** 2)
    penalty.backward()
    assert_close(weight.grad, 2 * (norm - 1) * weight.detach() / norm)
    scales = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)  # a slope of its own for each image
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    logits = F.conv2d(images * scales, weight.detach() / norm)
    assert_close(gradient_penalty(logits, images), torch.tensor((0 + 4) / 2))


def test_penalty_differentiates_the_gradient_of_the_whole_network():
    net = make((4, 4)).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)

    def penalty() -> torch.Tensor:
        true = images.clone().requires_grad_()
        return gradient_penalty(net(true), true)

    penalty().backward()
    for name in ("convs.0.weight", "convs.0.bias", "convs.1.weight", "to_logit.weight"):
        parameter, values = net.get_parameter(name), []
        direction = torch.randn_like(parameter)
        for step in (1e-7, -2e-7, 1e-7):  # up, down, back: too little to cross a kink
            parameter.data.add_(step * direction)
            values.append(penalty().item())
        slope = (parameter.grad * direction).sum().item()
        assert (values[0] - values[1]) / 2e-7 == pytest.approx(slope, rel=1e-5), name


def test_gradient_reaches_every_parameter_and_only_where_it_should():
    net = make()
    true, decoded = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    net.generator_loss(decoded).backward()
    assert decoded.grad.abs().max() > 0 and all(p.grad is None for p in net.parameters())
    want = -torch.autograd.grad(net(decoded).mean(), decoded)[0]
    assert_close(decoded.grad, want)
    decoded.grad = None
    loss, metrics = net.loss(true, decoded, 10.0)
    loss.backward()
    assert decoded.grad is None and true.grad is None
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    assert_close(loss, metrics["hinge"] + 10 * metrics["gradient_penalty"])


def test_it_learns_to_tell_frames_apart_and_the_penalty_holds_its_slope():
    def train(penalty: float, steps: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = Discriminator(DiscriminatorConfig((16, 32)), 3, (16, 16))
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
        for _ in range(steps):
            true = F.interpolate(torch.rand(8, 3, 4, 4), size=(16, 16))  # sharp edges
            decoded = F.avg_pool2d(true, 3, stride=1, padding=1)  # blurred, as L1 makes them
            optimizer.zero_grad()
            loss, metrics = net.loss(true, decoded, penalty)
            loss.backward()
            optimizer.step()
            net.refresh()
        return metrics

    free, held = train(0.0, 100), train(10.0, 30)
    assert free["hinge"] < 1.5 and free["logit_true"] > free["logit_decoded"] + 0.5
    assert held["gradient_penalty"] < 0.05 < 1 < free["gradient_penalty"]


def test_float32_under_autocast():
    net, true = make(), torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(true).dtype == torch.float32 and net.loss(true, true, 10.0)[0].dtype == torch.float32


def test_images_too_small():
    with pytest.raises(ValueError, match=r"images of 64x64 are too small .*6 convolutions.*fewer channels.*128 pixels"):
        Discriminator(DiscriminatorConfig(), 3, (64, 64))
