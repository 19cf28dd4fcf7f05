"""ema: the moving average of the weights, by hand."""

import pytest
import torch

from vlarft.run.ema import EMA


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


def test_state_round_trip():
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3))]
    ema, fresh = EMA(weights, 0.5), EMA(weights, 0.5)
    ema.averages[0] += 1
    fresh.load_state_dict(ema.state_dict())
    assert [a.tolist() for a in fresh.averages] == [[2.0, 2.0], [0.0, 0.0, 0.0]]
    EMA(weights, None).load_state_dict({})
    with pytest.raises(
        ValueError, match=r"averages are of 1 weights \(head.bias, ...\), expected 2.*remove train_state"
    ):
        fresh.load_state_dict({"head.bias": torch.zeros(2)})


def test_averages_that_were_read_to_the_cpu_go_where_the_weights_are():
    elsewhere = [torch.nn.Parameter(torch.zeros(2, device="meta"))]
    ema = EMA(elsewhere, 0.5)
    ema.load_state_dict({0: torch.ones(2)})
    assert ema.averages[0].device.type == "meta"
    ema.update(0)
