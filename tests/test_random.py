"""random: named random streams."""

import torch

from vlarft.run.random import generator, numpy_generator, seed_of


def test_seeds_depend_on_the_name_every_number_and_their_order():
    numbers = ((0,), (0, 0), (0, 1), (1, 0), (1,), ())
    seeds = {seed_of(name, *rest) for name in ("chains", "imagination") for rest in numbers}
    assert len(seeds) == 2 * len(numbers) and all(0 <= seed < 2**63 for seed in seeds)


def test_the_same_stream_gives_the_same_numbers():
    draws = [torch.rand(3, generator=generator("cpu", "chains", *rest)) for rest in ((3, 4), (3, 4), (4, 3))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    first, again, other = (numpy_generator(name, 3, 4).random(3) for name in ("windows", "windows", "frames"))
    assert (first == again).all() and not (first == other).any()
