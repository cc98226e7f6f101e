"""Randomness as a pure function of names: no global generator, nothing to store, nothing to restore.

Every draw is addressed by a tuple such as ``("hint", seed, step, row_id)``; the same address gives the same numbers on
any machine, with any number of workers, before and after a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(*address: object) -> int:
    """128-bit key of an address. Parts are told apart by type and position: ("a", 1) is not ("a", "1")."""
    # A separator inside a part is doubled, so no row id can imitate an address of more parts.
    text = "\x1f".join(f"{type(part).__name__}:{part}".replace("\x1f", "\x1f\x1f") for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*address: object) -> np.random.Generator:
    """A counter-based (Philox) generator that starts at this address."""
    return np.random.Generator(np.random.Philox(key=key(*address)))


def uniforms(*address: object, shape: int | tuple[int, ...]) -> np.ndarray:
    """float64 uniforms in [0, 1) of this shape."""
    return generator(*address).random(shape)
