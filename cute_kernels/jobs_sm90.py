"""What the warps of a CTA tell each other of the jobs in flight, and what they hand on, in groups."""

from __future__ import annotations

from typing import Any, NamedTuple


class Load(NamedTuple):
    """How TMA loads tiles of a tensor."""

    atom: Any
    tensor: Any


class Loads(NamedTuple):
    """Of the inputs."""

    q: Load
    k: Load
    v: Load


class Outputs(NamedTuple):
    """In global memory."""

    out: Any
    lse: Any


class Jobs(NamedTuple):
    """Of the jobs in flight, in shared memory."""

    call: Any  # slot, whether fresh, whether dense, and more with the residual: the same for all jobs
    words: Any  # [RING, JOB_WORDS]
    score_threshold: Any  # [RING], in units of row maxima
    visited: Any  # [RING, words], bits of tiles; with the residual [2 * RING, words], those of the second part after
    kept: Any  # [RING, tiles], bytes: 1 = some row keeps the tile
    partial: Any  # [words], bits of tiles of the job that the producer is at: some key is excluded
    references: Any  # [4 * consumers], with the residual: how the rows of a thread count in masses, see masses.py


class Shared(NamedTuple):
    """Tiles in shared memory, and promoted sums of the output."""

    q: Any
    k: Any
    v: Any
    sums: Any
