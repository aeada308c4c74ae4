"""Randomness as arithmetic: every draw is a function of (seed, purpose, its place).

Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key and a
counter into bits. The key is the run's seed and the purpose, the counter is the place: a step and
a position in the batch, or a sample's id. So no draw depends on earlier draws, on the batch split,
or on the number of processes, and no two purposes share a stream.
"""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """The generator of one draw. `place` is up to three integers in 0..2⁶⁴-1."""
    assert len(place) <= 3, f"three counter words are free, got {len(place)}"
    key = np.array([seed, hash64(purpose)], dtype=np.uint64)  # numpy would round a list's large words to floats
    counter = np.array([0, *place, *[0] * (3 - len(place))], dtype=np.uint64)  # numpy counts draws in word 0
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def hash64(text: str) -> int:
    """A stable 64-bit hash of a text, for purposes and sample ids."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normal(seed: int, purpose: str, *place: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal draws, float32 of `shape`."""
    return generator(seed, purpose, *place).standard_normal(shape, dtype=np.float32)


def uniform(seed: int, purpose: str, *place: int) -> float:
    """One draw from [0, 1)."""
    return float(generator(seed, purpose, *place).random())


def integer(seed: int, purpose: str, *place: int) -> int:
    """One draw from 0..2⁶³-1, to seed another library's generator."""
    return int(generator(seed, purpose, *place).integers(2**63))
