"""What 8 bits cost: the simulation of weights from bits, and the order of the ways."""

from __future__ import annotations

import torch

from benchmarks import accuracy


def test_weights_of_bits_are_those_of_the_float_with_these_bits() -> None:
    scores = torch.linspace(-20, 0, 2001, dtype=torch.float64)
    bits = ((scores + 127) * 2**23).round().to(torch.int32).view(torch.float32)
    torch.testing.assert_close(accuracy.weights_of_bits(scores), bits.double(), rtol=1e-6, atol=0)
    over = accuracy.weights_of_bits(scores) / torch.exp2(scores)
    assert 1 <= over.min() <= over.max() < 1.0615


def test_ways_differ_as_the_data_says() -> None:
    rows = {row[0]: dict(zip(accuracy.WAYS, map(float, row[1:]), strict=True)) for row in accuracy.measure(64, 512, 64)}
    normal, far = rows["normal"], rows["channels far from zero"]
    assert 35 < normal["int8"] < 45
    assert normal["int8_fp8"] < normal["int8, bits"] < normal["int8"] - 3
    assert far["int8"] > far["int8, as read"] + 8  # smoothing takes off what channels share
