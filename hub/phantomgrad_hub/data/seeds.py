"""Seeds derived from what they are for, so that nothing random has a hidden state to save."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: the same parts give the same seed on every machine.

    Each augmented image is drawn from `(seed, epoch, index)`, each training step from `(seed, step)`. A resumed
    run then repeats an uninterrupted one whatever the number of workers, without generator states on disk.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
