"""Image metrics against scikit-image and by hand; LPIPS never runs with random weights."""

import importlib
import math
import re
import sys

import pytest
import torch
from torch.testing import assert_close

from vlarft.metrics import moving_mask, mse, perceptual, pooled_psnr, psnr, ssim


def images(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(2, 3, 3, 24, 32, generator=generator)
    return (target + 0.2 * torch.randn(target.shape, generator=generator)).clamp(0, 1), target


def test_ssim_is_that_of_convolutions_with_the_window():
    x, y = torch.rand(2, 3, 20, 33), torch.rand(2, 3, 20, 33)  # not square: no axis stands for the other
    offsets = torch.arange(11.0) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)
    blur = lambda images: torch.nn.functional.conv2d(images, window, groups=3)  # noqa: E731
    mean_x, mean_y = blur(x), blur(y)
    spread = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    value = (2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4) / ((mean_x**2 + mean_y**2 + 1e-4) * (spread + 9e-4))
    assert_close(ssim(x, y), value.mean((1, 2, 3)), atol=1e-5, rtol=0)


def test_psnr_and_ssim_match_scikit_image():
    reference = pytest.importorskip("skimage.metrics")
    pred, target = images()
    got_psnr, got_ssim, got_mse = psnr(pred, target), ssim(pred, target), mse(pred, target)
    assert got_psnr.shape == got_ssim.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            x, y = (image[i, j].permute(1, 2, 0).double().numpy() for image in (target, pred))
            assert got_mse[i, j].item() == pytest.approx(reference.mean_squared_error(x, y), rel=1e-5)
            assert got_psnr[i, j].item() == pytest.approx(
                reference.peak_signal_noise_ratio(x, y, data_range=1), rel=1e-5
            )
            _, maps = reference.structural_similarity(
                x,
                y,
                channel_axis=2,
                data_range=1.0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                full=True,
            )
            # scikit-image blurs with a window of 11 too and cuts the border of 5 before its mean.
            assert got_ssim[i, j].item() == pytest.approx(maps[5:-5, 5:-5].mean(), abs=1e-5)


def test_masked_errors_by_hand():
    target = torch.zeros(1, 1, 2, 2)
    pred = torch.tensor([[[[0.5, 0.1], [0.0, 0.0]]]])
    mask = torch.tensor([[[[True, False], [True, False]]]])
    assert_close(mse(pred, target, mask), torch.tensor([0.125]))
    assert_close(psnr(pred, target, mask), torch.tensor([-10 * math.log10(0.125)]))
    assert pooled_psnr(pred, target, mask) == pytest.approx(-10 * math.log10(0.125))
    assert pooled_psnr(pred, target) == pytest.approx(-10 * math.log10(0.26 / 4))
    assert pooled_psnr(target, target) == math.inf and math.isnan(pooled_psnr(pred, target, mask & ~mask))
    moved = moving_mask(torch.tensor([[[[0.05]], [[0.0]], [[0.0]]]]), torch.zeros(1, 3, 1, 1))
    assert moved.shape == (1, 1, 1, 1) and moved.all() and not moving_mask(pred[..., 1:, :], target[..., 1:, :]).any()


def test_perceptual_without_weights():
    pred, target = images()
    assert torch.equal(perceptual("none")(pred, target), torch.zeros(2, 3))
    distance = perceptual("ssim")
    assert_close(distance(pred, target), (1 - ssim(pred, target)) / 2)
    assert_close(distance(target, target), torch.zeros(2, 3), atol=1e-6, rtol=0)
    groups = torch.stack([pred, target], dim=1)  # two predictions for each of two targets
    reused = distance.distance_to(groups.flatten(0, 1)[:, :1], distance.features(target[:, :1]))
    assert_close(reused[::2], distance(pred[:, :1], target[:, :1]))
    pred.requires_grad_()
    distance(pred, target).sum().backward()
    assert pred.grad.abs().max() > 0


def test_lpips_is_never_random(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth does not exist.*--perceptual ssim"):
        perceptual("lpips")
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.pth does not exist"):
        perceptual("lpips", tmp_path / "elsewhere.pth")
    torch.save({}, tmp_path / "there.pth")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[lpips\]"'):
        perceptual("lpips", tmp_path / "there.pth")


def test_errors():
    with pytest.raises(ValueError, match="must be lpips, ssim or none, got 'vgg'"):
        perceptual("vgg")
    with pytest.raises(ValueError, match="only lpips has weights"):
        perceptual("ssim", "some.pth")
    with pytest.raises(ValueError, match="at least 11 pixels, got 8x32"):
        ssim(torch.rand(1, 3, 8, 32), torch.rand(1, 3, 8, 32))


OPERATORS = []  # that torchvision lacks, as long as this lives


def load_torchvision() -> None:
    """Import torchvision, whose own operators do not load beside a build of torch other than it was made for (its wheel
    for CUDA, torch's for the CPU). They serve detection alone: names in their place let the rest load.
    """
    if sys.modules.get("torchvision", "") is None:  # hidden, see conftest.transformers
        del sys.modules["torchvision"]
    for _ in range(20):
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            assert missing, error
            OPERATORS.append(torch.library.Library("torchvision", "FRAGMENT"))
            OPERATORS[-1].define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
    raise AssertionError("torchvision does not load")


def random_vgg(path):
    """A file of torchvision's layout with random weights, of which lpips takes the layers that it reads."""
    load_torchvision()
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    backbone = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.state_dict()
    torch.save({f"features.{key.split('.', 1)[1]}": value for key, value in backbone.items()}, path)


def test_lpips_reuses_the_features_of_a_target_and_is_the_packages(tmp_path):
    random_vgg(tmp_path / "vgg.pth")
    distance = perceptual("lpips", tmp_path / "vgg.pth")
    torch.manual_seed(1)
    targets, preds = torch.rand(2, 3, 64, 64), torch.rand(2, 4, 3, 64, 64)
    got = distance.distance_to(preds, distance.features(targets))
    with torch.no_grad():
        want = distance.lpips(preds.flatten(0, 1), targets.repeat_interleave(4, 0), normalize=True).view(2, 4)
    assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert_close(distance(targets, targets), torch.zeros(2), atol=1e-6, rtol=0)
    assert distance.bytes_per_image(targets) > distance.bytes_per_image(targets[..., :32]) > 0
    in_bfloat16 = distance.to_bfloat16().distance_to(preds, distance.features(targets))
    assert in_bfloat16.dtype == torch.float32 and 0 < (in_bfloat16 - want).abs().max() < 0.05 * want.mean()
