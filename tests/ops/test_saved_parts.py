"""Saved states of parts of a site: joined they are that of the whole, of which each part goes on as the whole does."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch

from lite_attention.ops import ResidualState, SkipState, residual_attention, skip_attention
from lite_attention.ops.part import Part
from lite_attention.ops.saved_parts import Saved, joined, own_part
from lite_attention.ops.shard import Ranks, Shard
from lite_attention.ops.site_state import SiteState

BATCH, HEADS, TOKENS, DIM, TILE = 1, 5, 64, 8, 8
KINDS = ["votes", "votes, initial mask", "votes, one initial mask", "fp8", "bf16", "fp32"]
SHARES = [(2, 1), (5, 1), (1, 2), (1, 4), (2, 2), (3, 8)]  # of heads, unevenly too, and of queries


def qkv(step: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(step)
    pull = torch.randn(8, 1, HEADS, DIM, generator=torch.Generator().manual_seed(99)).repeat_interleave(8, 0)[:, 0]
    return [0.3 * torch.randn(BATCH, TOKENS, HEADS, DIM, generator=noise) + pull for _ in range(3)]


def new_state(kind: str, place: Part | None = None) -> SiteState:
    heads = range(HEADS) if place is None else place.heads
    rows = range(TOKENS) if place is None else place.rows
    sizes: dict[str, Any] = {
        "batch": BATCH, "heads": len(heads), "seq_q": len(rows), "seq_k": TOKENS, "tile_m": TILE, "tile_n": TILE,
    }  # fmt: skip
    state: SiteState
    if kind.startswith("votes"):
        mask = torch.rand(1, HEADS, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.2
        if kind == "votes, one initial mask":
            mask = mask[:, :1]
        mask = mask[:, heads] if mask.shape[1] > 1 else mask
        mask = mask[:, :, rows.start // TILE : rows.stop // TILE]
        state = SkipState(**sizes, threshold=-2.0, num_steps=6, initial_mask=mask if "mask" in kind else None)
    else:
        plan = [2, 1, 0, 0, 2, 0]
        state = ResidualState(**sizes, value_dim=DIM, plan=plan, keep=0.4, residual_dtype=kind)  # type: ignore[arg-type]
    if place is not None:
        state.hold_place(place.words())
        state.query_start = None if place.has_all_queries else place.query_start
    return state


def attend(state: SiteState, step: int, place: Part | None = None) -> torch.Tensor:
    q, k, v = qkv(step)
    if place is not None:
        heads = list(place.heads)
        q, k, v = q[:, place.rows][:, :, heads], k[:, :, heads], v[:, :, heads]
    if isinstance(state, SkipState):
        return skip_attention(q, k, v, state)
    assert isinstance(state, ResidualState)
    return residual_attention(q, k, v, state)


def whole_state(kind: str) -> SiteState:
    state = new_state(kind)
    for step in range(3):
        attend(state, step)
    if isinstance(state, SkipState):
        state.set_threshold(-torch.arange(1.0, HEADS + 1))
    return state


def places(head_ranks: int, query_ranks: int) -> list[Part]:
    found = []
    for query, rows in enumerate(torch.arange(TOKENS).tensor_split(query_ranks)):
        for head in range(head_ranks):
            shard = Shard(Ranks(head, head_ranks), Ranks(query, query_ranks), HEADS)
            here = len(range(HEADS)[shard._block(HEADS)])
            if here:
                found.append(shard.part(here, len(rows), TOKENS))
    return found


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


@functools.cache
def steps_of_whole(kind: str) -> tuple[Saved, list[torch.Tensor], Saved]:
    """Return a state of the whole, what two more steps give, and the state then."""
    whole = whole_state(kind)
    saved = copy.deepcopy(whole.state_dict())
    out = [attend(whole, step) for step in (3, 4)]
    assert 0 < float(whole.sparsity()) < 1
    return saved, out, whole.state_dict()


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_go_on_as_the_whole_does_and_are_the_whole_when_joined(kind: str, shares: tuple[int, int]) -> None:
    saved, outs, then = steps_of_whole(kind)
    parts = [new_state(kind, place) for place in places(*shares)]
    for part in parts:
        part.load_state_dict(saved)
    again = new_state(kind)
    again.load_state_dict(joined([part.state_dict() for part in parts]))
    assert same(again.state_dict(), saved)
    for step, out in zip((3, 4), outs, strict=True):
        for part, place in zip(parts, places(*shares), strict=True):
            of_place = out[:, place.rows][:, :, list(place.heads)]
            if kind.startswith("votes") or step == 3:  # a full step decides over a part, as ranks do
                torch.testing.assert_close(attend(part, step, place), of_place, rtol=0, atol=1e-6)
    if kind.startswith("votes"):
        again.load_state_dict(joined([part.state_dict() for part in parts]))
        assert same(again.state_dict(), then)


def test_heads_that_were_dealt_are_joined_in_the_order_of_the_model() -> None:
    whole = whole_state("votes").state_dict()
    dealt = [Part((4, 0), HEADS, 0, TOKENS, TOKENS), Part((2, 1, 3), HEADS, 0, TOKENS, TOKENS)]
    parts = [new_state("votes", place) for place in dealt]
    for part in parts:
        part.load_state_dict(whole)
    assert parts[0].state_dict()["threshold"][0, 0].tolist() == [-5.0, -1.0]
    assert same(joined([part.state_dict() for part in parts]), whole)


@pytest.mark.parametrize("kind", ["votes", "fp8"])
@pytest.mark.parametrize("way", ["load_state_dict", "from_state_dict"])
def test_a_state_of_another_part_is_refused(kind: str, way: str) -> None:
    first, second = (new_state(kind, place) for place in places(1, 2))  # of the same shapes
    whole = new_state(kind)
    again = type(first).from_state_dict(first.state_dict())
    assert again.place == first.place != second.place
    saved = (first if way == "load_state_dict" else again).state_dict()
    before = second.state_dict() | {"control": second.control.clone()}
    with pytest.raises(ValueError, match="part of the model: expected a state of queries 32 to 63 of 64, or all, got "):
        second.load_state_dict(saved)
    with pytest.raises(ValueError, match="expected a state of all heads and queries, got that of queries 0 to 31"):
        whole.load_state_dict(saved)
    assert same(second.state_dict(), before)
    first.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["votes", "fp8"])
def test_copies_and_moves_keep_the_part(kind: str) -> None:
    place = places(2, 2)[3]
    state = new_state(kind, place)
    for twin in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.half()):
        assert twin.place == place
        twin.load_state_dict(whole_state(kind).state_dict())
    with torch.inference_mode():
        born = new_state(kind, place)
    born.load_state_dict(whole_state(kind).state_dict())
    assert same(born.state_dict(), state.state_dict())


def test_a_whole_of_other_sizes_is_refused() -> None:
    part = new_state("votes", places(2, 1)[0])
    other = new_state("votes", Part((0, 1, 2), 3, 0, TOKENS, TOKENS))
    other.hold_place(None)  # as many heads as the part has
    with pytest.raises(
        ValueError, match=r"geometry \(heads, seq_q\): expected \(5, 64\), of the whole model, got \(3, 64\)"
    ):
        part.load_state_dict(other.state_dict())


def test_queries_that_are_no_whole_tiles_are_refused() -> None:
    rows = [range(36), range(36, 64)]
    parts = [Part(tuple(range(HEADS)), HEADS, run.start, len(run), TOKENS) for run in rows]
    states = [new_state("fp32", place) for place in parts]
    told = r"queries: expected parts of whole tiles of 8, .* got queries 0 to 35 of 64"
    with pytest.raises(ValueError, match=told):
        states[0].load_state_dict(whole_state("fp32").state_dict())
    with pytest.raises(ValueError, match=told):
        joined([state.state_dict() for state in states])


def test_what_is_not_of_one_whole_is_not_joined() -> None:
    states = [new_state("votes", place) for place in places(2, 1)]
    first, second = (state.state_dict() for state in states)
    for parts in ([first], [first, first], [first, second, second]):
        with pytest.raises(ValueError, match="each head and query once, of modules with parts=1, got heads"):
            joined(parts)
    with pytest.raises(ValueError, match="process_group: expected parts of one model, got some that have all of it"):
        joined([new_state("votes").state_dict(), second])
    states[1].set_step(2)
    with pytest.raises(ValueError, match="control: expected the same on all ranks, which do the same calls"):
        joined([first, states[1].state_dict()])


@pytest.mark.parametrize(
    ("name", "options"),
    [("geometry", {"tile_n": 4}), ("geometry", {"batch": 2}), ("threshold", {"threshold": torch.zeros(9, 1)})],
)
def test_states_of_other_sizes_are_not_joined(name: str, options: dict[str, Any]) -> None:
    """Such as those of another card, whose tiles are others."""
    first, second = (new_state("votes", place).state_dict() for place in places(2, 1))
    sizes = {"batch": BATCH, "heads": 2, "seq_q": TOKENS, "seq_k": TOKENS, "tile_m": TILE, "tile_n": TILE}
    other = SkipState(**{**sizes, "num_steps": 6, **options})
    other.hold_place(second["part"])
    with pytest.raises(ValueError, match=f"{name}: expected the same on all ranks"):
        joined([first, other.state_dict()])


def test_a_latest_call_of_fewer_queries_is_not_cut() -> None:
    state = new_state("votes")
    assert isinstance(state, SkipState)
    q, k, v = (x[:, :40] for x in qkv(0))
    skip_attention(q, k, v, state)
    new_state("votes", places(2, 1)[0]).load_state_dict(state.state_dict())  # heads alone
    with pytest.raises(ValueError, match="seq_q of the latest call: expected 64, to be joined or cut, got 40"):
        new_state("votes", places(1, 2)[0]).load_state_dict(state.state_dict())


@pytest.mark.parametrize(
    ("name", "dim"),
    [("skip_mask", -3), ("skip_mask", -2), ("threshold", -1), ("initial_mask", -3), ("initial_mask", -2)],
)
def test_tensors_of_other_shapes_are_refused(name: str, dim: int) -> None:
    saved = whole_state("votes, initial mask").state_dict()
    saved[name] = saved[name].narrow(dim, 0, saved[name].shape[dim] - 1)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        new_state("votes, initial mask", places(2, 2)[0]).load_state_dict(saved)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dict: expected a state, with its geometry"):
        own_part({}, None)
    saved = whole_state("votes").state_dict()
    with pytest.raises(ValueError, match="geometry: expected 6 integers"):
        new_state("votes", places(2, 1)[0]).load_state_dict({**saved, "geometry": torch.zeros(3)})
