"""The average of the weights, by hand."""

import pytest
import torch

from vlarft.ema import EMA


def test_by_hand():
    weight = torch.nn.Parameter(torch.zeros(2))
    ema = EMA([weight], 0.5)
    with torch.no_grad():
        weight.fill_(1.0)
    ema.update(0)  # decay 1 / 10
    assert ema.averages[0].tolist() == pytest.approx([0.9, 0.9])
    with torch.no_grad():
        weight.fill_(0.0)
    ema.update(50)  # decay 0.5
    assert ema.averages[0].tolist() == pytest.approx([0.45, 0.45])
    with ema.swapped():
        assert weight.tolist() == pytest.approx([0.45, 0.45])
    assert weight.tolist() == [0.0, 0.0]
    with pytest.raises(KeyError), ema.swapped():
        raise KeyError
    assert weight.tolist() == [0.0, 0.0]


def test_without_a_decay_there_is_none():
    weight = torch.nn.Parameter(torch.zeros(2))
    ema = EMA([weight], None)
    ema.update(0)
    with ema.swapped():
        assert weight.tolist() == [0.0, 0.0] and ema.averages == []
