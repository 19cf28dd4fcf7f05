"""Named random streams: every use of random numbers in a run has a name, so no two uses share their numbers.

    generator(device, "chains", seed, step)     torch numbers of one step
    numpy_generator("windows", seed, step)      numpy numbers
    seed_of("weights", seed)                    a seed, for torch.manual_seed

A stream's numbers depend on its name and integers alone: not on the order of calls, nor on the number of processes. So
a run saves no random state: a resumed step makes the same generators again from (seed, step).
"""

import hashlib

import numpy as np
import torch


def _sequence(stream: str, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "big")
    return np.random.SeedSequence((name, len(numbers), *numbers))  # it pads with 0: the count tells (1,) from (1, 0)


def seed_of(stream: str, *numbers: int) -> int:
    """Return a 63-bit seed of the stream at these integers, by convention (seed, step, ...)."""
    return int(_sequence(stream, numbers).generate_state(1, np.uint64)[0] >> 1)


def generator(device: torch.device | str, stream: str, *numbers: int) -> torch.Generator:
    """Make a torch generator of the stream at these integers."""
    return torch.Generator(device).manual_seed(seed_of(stream, *numbers))


def numpy_generator(stream: str, *numbers: int) -> np.random.Generator:
    """Make a numpy generator of the stream at these integers."""
    return np.random.default_rng(_sequence(stream, numbers))
