"""`Clock`: the branch, step and generation of each forward, from all that may tell something of it."""

from __future__ import annotations

from typing import Any

import pytest

from lite_attention.ops.clock import Clock

# What a forward is told: (name, step, timestep), and perhaps the scheduler's index. What it is: (branch, step,
# generation).
Told = tuple[Any, ...]
Is = tuple[str | int, int, int]


def bare(*timesteps: float | None) -> list[Told]:
    return [(None, None, t) for t in timesteps]


def named(names: str, *timesteps: float | None) -> list[Told]:
    return [(name, None, t) for t in timesteps for name in names]


CASES: dict[str, tuple[list[Told], list[Is]]] = {
    "told": (
        [("c", 0, 9.0), ("u", 0, 9.0), ("c", 1, 5.0), ("u", 1, 5.0), ("c", 0, 9.0)],
        [("c", 0, 1), ("u", 0, 1), ("c", 1, 1), ("u", 1, 1), ("c", 0, 2)],
    ),
    "told, from a later step on": ([("c", 6, None), ("c", 7, None)], [("c", 6, 1), ("c", 7, 1)]),
    "two passes that nobody names": (
        bare(9, 9, 5, 5, 1, 1, 9, 9),
        [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 2, 1), (1, 2, 1), (0, 0, 2), (1, 0, 2)],
    ),
    "one pass": (bare(9, 5, 1, 9), [(0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 0, 2)]),
    "timesteps that grow": (bare(0, 0.1, 0.5, 0), [(0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 0, 2)]),
    "guidance that ends midway": (
        bare(9, 9, 5, 5, 1, 0.5),
        [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 3, 1)],
    ),
    "names and timesteps": (
        named("cu", 9, 5, 9),
        [("c", 0, 1), ("u", 0, 1), ("c", 1, 1), ("u", 1, 1), ("c", 0, 2), ("u", 0, 2)],
    ),
    "a branch whose step is told, and one that has a name only": (
        [("c", 0, None), ("u", None, 9.0), ("c", 1, None), ("u", None, 5.0), ("u", None, 1.0)],
        [("c", 0, 1), ("u", 0, 1), ("c", 1, 1), ("u", 1, 1), ("u", 2, 1)],
    ),
    "names alone": (named("cu", None, None), [("c", 0, 1), ("u", 0, 1), ("c", 1, 1), ("u", 1, 1)]),
    "names alone, guidance midway only": (
        [("c", None, None), ("c", None, None), ("u", None, None), ("c", None, None)],
        [("c", 0, 1), ("c", 1, 1), ("u", 1, 1), ("c", 2, 1)],
    ),
    "a solver that evaluates a named branch twice at one timestep": (
        named("c", 9, 5, 5, 1),
        [("c", 0, 1), ("c", 1, 1), ("c", 2, 1), ("c", 3, 1)],
    ),
    "two passes of a solver of second order": (
        [(None, None, t, i) for t, i in ((9, None), (5, 1), (5, 2), (1, 3), (1, 4), (9, None)) for _ in range(2)],
        [(branch, step, 1) for step in range(5) for branch in (0, 1)] + [(0, 0, 2), (1, 0, 2)],
    ),
    "a scheduler that stands still": (
        [(None, None, t, 7) for t in (9, 9, 5, 5)],
        [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)],
    ),
    "nothing at all": (bare(None, None, None), [(0, 0, 1), (0, 1, 1), (0, 2, 1)]),
    "told now and counted then": (
        [("c", 0, None), ("c", 1, None), ("c", None, None)],
        [("c", 0, 1), ("c", 1, 1), ("c", 2, 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_places(case: str) -> None:
    told, want = CASES[case]
    clock = Clock()
    places = [clock.place(*one) for one in told]
    assert [tuple(place)[:3] for place in places] == want
    assert [place.is_told for place in places] == [step is not None for _, step, *_ in told]


@pytest.mark.parametrize(
    ("arguments", "timesteps", "starts"),
    [
        ({"num_steps": 3}, bare(*[None] * 7), [0, 3, 6]),
        ({"num_steps": 2}, named("cu", None, None, None), [0, 4]),
        ({"num_steps": 2}, bare(9, 9, 5, 5, 1, 1), [0, 4]),
        ({"max_steps": 2}, bare(None, None, None), [0, 2]),
        ({"max_steps": 2}, bare(9, 5, 3, 1), [0]),  # the timestep will turn back
        ({"num_steps": 3, "max_steps": 2}, bare(*[None] * 4), [0, 3]),
    ],
)
def test_a_generation_ends_by_itself(arguments: dict[str, int], timesteps: list[Told], starts: list[int]) -> None:
    clock = Clock(**arguments)
    generations = [clock.place(*told).generation for told in timesteps]
    assert [i for i, now in enumerate(generations) if i == 0 or now != generations[i - 1]] == starts


@pytest.mark.parametrize("told", [bare(9, 9, 5), bare(None, None), named("cu", None)])
def test_who_begins_a_generation_is_believed(told: list[Told]) -> None:
    clock = Clock()
    first = [clock.place(*one) for one in told]
    clock.begin()
    again = [clock.place(*one) for one in told]
    assert [place._replace(generation=1) for place in again] == first
    assert {place.generation for place in again} == {2}


def test_a_loop_of_known_length_ends_where_nothing_else_tells() -> None:
    clock = Clock()
    clock.begin_loop(2)
    assert [clock.place("c").generation for _ in range(5)] == [1, 1, 2, 2, 3]
    clock = Clock()
    clock.begin_loop(2)
    assert [clock.place("c", timestep=t).generation for t in (9.0, 5.0, 5.0, 1.0)] == [1] * 4  # two evaluations a step


def evidence(told: list[Told], **arguments: Any) -> tuple[bool, bool, bool]:
    clock = Clock(**arguments)
    for one in told:
        clock.place(*one)
    return clock.is_told, clock.is_blind, clock.is_endless


def test_what_is_known_is_said() -> None:
    assert evidence(bare(None)) == (False, True, True)
    assert evidence(bare(None), num_steps=4) == (False, True, False)
    assert evidence(bare(9, 5)) == (False, False, False)
    assert evidence(bare(9, 5, 9)) == (True, False, False)
    assert evidence(named("c", None)) == (False, False, True)
    assert evidence([("c", 0, None)]) == (True, False, False)
    clock = Clock()
    clock.begin(is_told=False)
    assert not clock.is_told
    clock.begin_loop()
    assert clock.is_told
    assert clock.has_loop
