"""Named random streams: every use of random numbers in a run has a name, so that no two uses share their numbers.

    generator(device, "chains", seed, step)     torch numbers of one step
    numpy_generator("windows", seed, step)      numpy numbers
    seed_of("weights", seed)                    a seed, for torch.manual_seed

What a stream gives depends on its name and its integers alone: not on the order of calls, on what ran before a resume,
or on the number of processes.
"""

import hashlib

import numpy as np
import torch


def _sequence(stream: str, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "big")
    return np.random.SeedSequence((name, len(numbers), *numbers))  # the count keeps (1,) and (1, 0) apart


def seed_of(stream: str, *numbers: int) -> int:
    """A 63-bit seed of the stream at these integers, by convention (seed, step, ...)."""
    return int(_sequence(stream, numbers).generate_state(1, np.uint64)[0] >> 1)


def generator(device: torch.device | str, stream: str, *numbers: int) -> torch.Generator:
    """A fresh torch generator of the stream at these integers."""
    return torch.Generator(device).manual_seed(seed_of(stream, *numbers))


def numpy_generator(stream: str, *numbers: int) -> np.random.Generator:
    """A fresh numpy generator of the stream at these integers."""
    return np.random.default_rng(_sequence(stream, numbers))
