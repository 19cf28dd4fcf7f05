"""memory: the estimate of a step, counted by hand on a network of two layers."""

import torch

from vlarft.run.distributed import recompute
from vlarft.run.memory import CPU_BYTES, Memory, estimate, rows_at_once, saved_bytes


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 2, bias=False))


def test_what_the_backward_needs_is_counted_once():
    model = network()
    x = torch.zeros(5, 3)
    # the first layer's input and the sigmoid's output, which is also the second layer's input; no weights
    assert saved_bytes(model, lambda: model(x).sum()) == 4 * (5 * 3 + 5 * 4)
    model[0].requires_grad_(False)  # the first layer's backward is not needed any more
    assert saved_bytes(model, lambda: model(x).sum()) == 4 * (5 * 4)


def test_estimate_by_hand():
    model = network()

    def forward(rows: int) -> torch.Tensor:
        return model(torch.zeros(rows, 3)).sum() + model[0].weight.exp().sum()  # 12 numbers whatever the rows

    found = estimate(model, forward, rows=16, unit=2, ema=True)
    weights = 4 * (3 * 4 + 4 + 4 * 2)
    assert found == Memory(weights, 4 * weights, 4 * (16 * (3 + 4) + 12))
    model[2].requires_grad_(False)
    assert estimate(model, forward, rows=16, unit=2, ema=False).training == 3 * 4 * (3 * 4 + 4)


def test_recomputed_blocks_keep_their_inputs_only():
    model = torch.nn.Sequential(network()[:2])
    before = saved_bytes(model, lambda: model(torch.zeros(5, 3)).sum())
    recompute(model)
    assert saved_bytes(model, lambda: model(torch.zeros(5, 3)).sum()) == 4 * 5 * 3 < before


def test_shown():
    shown = str(Memory(2**30, 3 * 2**30, 2**29))
    assert shown == "memory of a step, estimated: 4.50 GiB (weights 1.00  training 3.00  activations 0.50)"
    assert "estimated: 1.50 MiB (weights 1.00 " in str(Memory(2**20, 0, 2**19))


def test_rows_that_fit():
    device = torch.device("cpu")
    assert rows_at_once(CPU_BYTES // 10, device) == 10
    assert rows_at_once(100 * CPU_BYTES, device) == 1  # at least one
