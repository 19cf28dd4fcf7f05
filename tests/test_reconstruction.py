"""Reconstruction losses: hand-computed values, the last layer's gradient against autograd."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from vlarft.tokenizer import PRESETS, FrameTokenizer, Reconstruction
from vlarft.tokenizer_loss import (
    Weighting,
    adversarial_balance,
    colour_weights,
    last_layer_gradient,
    reconstruction_loss,
    reconstruction_psnr,
)


def test_reconstruction_loss_by_hand():
    frames = torch.zeros(1, 1, 1, 2, 2)
    frames[..., 0, 0] = 1.0  # one of four pixels moves
    context = torch.zeros(1, 1, 2, 2)
    decoded = torch.zeros(1, 1, 1, 2, 2)
    decoded[..., 1, 1] = 0.5
    unused = torch.zeros(1)
    out = Reconstruction(context + 0.25, decoded, unused, unused, torch.full((1, 1, 4, 2), 0.5), unused)
    loss, parts = reconstruction_loss(out, context, frames)
    assert_close(parts["context_error"], torch.tensor(0.25))
    assert_close(parts["future_error"], torch.tensor(1.5 / 4))
    assert_close(loss, torch.tensor(0.25 + 1.5 / 4))
    # The moving pixel has weight 3: (3 * 1 + 0.5) / 4.
    _, parts = reconstruction_loss(out, context, frames, weighting=Weighting(moving=3.0))
    assert_close(parts["future_error"], torch.tensor(3.5 / 4))
    # Squares of weight 2: (1 + 2 + 0.5 + 2 * 0.25) / 4.
    _, parts = reconstruction_loss(out, context, frames, weighting=Weighting(square=2.0))
    assert_close(parts["future_error"], torch.tensor(1.0))
    # Against a white median frame the three black pixels are unusual, and all four of the context.
    _, parts = reconstruction_loss(
        out, context, frames, median_frame=torch.ones(1, 2, 2), weighting=Weighting(unusual=2.0)
    )
    assert_close(parts["future_error"], torch.tensor((1 + 2 * 0.5) / 4))
    # Against a black one the white pixel is unusual and moves: it has the larger of both weights, not their sum.
    both = Weighting(unusual=2.0, moving=3.0)
    _, parts = reconstruction_loss(out, context, frames, median_frame=torch.zeros(1, 2, 2), weighting=both)
    assert_close(parts["future_error"], torch.tensor(3.5 / 4))
    # Half resolution: one pixel of target 0.25 and decoded 0.125, averaged with the full resolution.
    _, parts = reconstruction_loss(out, context, frames, weighting=Weighting(pyramid=2))
    assert_close(parts["future_error"], torch.tensor((1.5 / 4 + 0.125) / 2))
    # Four tokens of one pixel each, codes of square 0.25; the one that moves does not count.
    out.future_codes[0, 0, 0] = 9.0
    loss, parts = reconstruction_loss(out, context, frames, weighting=Weighting(still=0.1))
    assert_close(parts["still_code"], torch.tensor(0.25 * 3 / 4))
    assert_close(loss, torch.tensor(0.25 + 1.5 / 4 + 0.1 * 0.25 * 3 / 4))
    constant = reconstruction_loss(out, context, frames, perceptual=lambda a, b: a.new_ones(1) / 2)
    assert_close(constant[0], torch.tensor(0.25 + 1.5 / 4 + 1.0))


def test_psnr_of_what_moves_and_of_what_is_unusual():
    context, frames, decoded_context = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    frames[..., 0, 0] = context[..., 1, 1] = 1.0  # two pixels move; one of the context is not as in the median frame
    decoded = frames.clone()
    decoded[..., 0, 0], decoded[..., 0, 1], decoded_context[..., 1, 1] = 0.9, 0.5, 0.9
    found = reconstruction_psnr(decoded_context, decoded, context, frames, torch.zeros(1, 2, 2))
    want = {"context": 0.01 / 4, "context_unusual": 0.01, "future": 0.26 / 4, "moving": 0.01 / 2, "moving_copy": 1.0}
    assert found == pytest.approx({f"val_psnr_{name}": -10 * math.log10(mse) for name, mse in want.items()}, abs=1e-4)


def test_rare_colours_weigh_more_where_they_are_and_where_they_were():
    data = torch.zeros(1, 3, 10, 10)
    data[0, 0, 0, 0] = 1.0  # one red pixel of 100
    weights = colour_weights(data, largest=4.0)
    assert weights.shape == (125,) and weights[0] == 1 and weights[124] == 4  # black; white, which never occurs
    assert weights[4].item() == pytest.approx(2**0.5)  # red: sqrt(0.02 / 0.01)
    context, frames = torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 3, 2, 2)
    context[0, 0, 0, 0] = frames[0, 0, 0, 1, 1] = 1.0  # a red pixel goes from one corner to the other
    unused = torch.zeros(1)
    out = Reconstruction(context + 0.1, frames + 0.1, unused, unused, unused, unused)
    _, parts = reconstruction_loss(out, context, frames, weighting=Weighting(rare=4.0), colour_weight=weights)
    assert_close(parts["future_error"], torch.tensor(0.1 * (2 * 2**0.5 + 2) / 4))
    assert_close(parts["context_error"], torch.tensor(0.1 * (2**0.5 + 3) / 4))


def test_generated_frame_is_learnt_where_the_mask_hides_it():
    frames, context = torch.zeros(1, 1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    frames[..., 0, 0] = 1.0  # what moves
    generated = torch.full((1, 1, 1, 8, 8), 0.5, requires_grad=True)
    mask, unused = torch.zeros(1, 1, 1, 8, 8), torch.zeros(1)
    out = Reconstruction(context, context[None], unused, unused, unused, unused, generated, mask)
    loss, parts = reconstruction_loss(out, context, frames)
    assert_close(parts["future_error"], torch.tensor(1 / 64))
    assert_close(parts["generated_error"], torch.tensor(9 * 0.5 / 64))  # the pixel and those up to two away
    assert_close(loss, torch.tensor(5.5 / 64))
    loss.backward()
    want = torch.zeros(8, 8)
    want[:3, :3], want[0, 0] = 1 / 64, -1 / 64
    assert_close(generated.grad[0, 0, 0], want)


@pytest.mark.parametrize("compose", [False, True])
def test_last_layer_gradient_against_autograd(compose):
    torch.manual_seed(0)
    model = FrameTokenizer(replace(PRESETS["smoke"], compose=compose))
    frames = torch.rand(2, 3, 3, 64, 64)
    out = model(frames[:, 0], frames)
    shown = out._replace(generated=None, mask=None)  # without the generated frame's own loss
    loss = reconstruction_loss(shown, frames[:, 0], frames, weighting=Weighting(pyramid=2))[0]
    (want,) = torch.autograd.grad(loss, model.cond_decoder.conv_out.weight, retain_graph=True)
    assert_close(last_layer_gradient(loss, out), want, atol=1e-7, rtol=1e-4)
    loss.backward()  # the graph is still there


def test_adversarial_balance_by_hand():
    assert adversarial_balance(torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 0.5]])) == pytest.approx(10)
    assert adversarial_balance(torch.ones(1), torch.zeros(1)) == pytest.approx(1e4)
