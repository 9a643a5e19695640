"""`Shard`: which heads, queries and tiles are here, and that nothing else is ever taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lite_attention
from lite_attention.compile.settings import SkipSettings
from lite_attention.compile.store import StateStore
from lite_attention.enabled import store_of
from lite_attention.ops import Session, SkipState
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.shard import WHOLE, Ranks, Shard
from lite_attention.ops.site import Site
from lite_attention.parallel.shard import shard_of
from tests.support import toys


def of_heads(rank: int, ranks: int, heads: int | None = None) -> Shard:
    return Shard(Ranks(rank, ranks), heads=heads)


def site(heads: int, seq_q: int = 32, seq_k: int = 32) -> Site:
    shapes = (1, seq_q, heads, 8), (1, seq_k, heads, 8), (1, seq_k, heads, 8)
    return Site("attn", "Attention", 0, *shapes, torch.float32, torch.device("cpu"))


# ---- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (12, 3), (30, 8), (5, 2), (3, 1)])
def test_the_heads_of_all_ranks_are_those_of_the_model(heads: int, ranks: int) -> None:
    each = -(-heads // ranks)
    here = [min(each, heads - rank * each) for rank in range(ranks)]
    table = torch.arange(heads).view(1, 1, heads)
    parts = [of_heads(rank, ranks, heads).own_heads("threshold", table, n) for rank, n in enumerate(here)]
    assert torch.equal(torch.cat(parts, -1), table)
    for rank, n in enumerate(here):
        assert of_heads(rank, ranks, heads).whole(site(n)).q_shape[2] == heads


def test_where_heads_divide_the_model_need_not_tell_how_many_there_are() -> None:
    table = torch.arange(6)
    assert of_heads(1, 2).own_heads("threshold", table, 3).tolist() == [3, 4, 5]
    assert of_heads(1, 2, heads=40).own_heads("threshold", table, 3).tolist() == [3, 4, 5]  # a site of other heads


@pytest.mark.parametrize("value", [-3.0, torch.tensor(-3.0), torch.full((2, 5, 1), -3.0)])
def test_what_is_one_for_all_heads_is_taken_as_it_is(value: float | torch.Tensor) -> None:
    assert of_heads(1, 2).own_heads("threshold", value, 4) is value


@pytest.mark.parametrize("heads", [2, 3, 5, 8])
def test_a_table_of_other_heads_is_refused_by_every_rank(heads: int) -> None:
    """Also one of as many heads as a rank has: it is another rank's, or a single process's."""
    for rank in (0, 1):
        with pytest.raises(ValueError, match=f"threshold: .* 4, .* rank {rank} of 2 takes 2; got {heads}"):
            of_heads(rank, 2).own_heads("threshold", torch.zeros(1, 1, heads), 2)


# ---- queries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "ranks"), [(96, 2), (97, 2), (135, 4), (10, 3)])
def test_the_queries_of_all_ranks_are_those_of_the_model(tokens: int, ranks: int) -> None:
    parts = torch.arange(tokens).tensor_split(ranks)
    for rank, part in enumerate(parts):
        shard = Shard(query_ranks=Ranks(rank, ranks))
        assert shard.query_start(len(part), tokens) == part[0]
        assert shard.whole(site(2, len(part), tokens)).q_shape[1] == tokens
        assert shard.query_start(len(part) + 2, tokens) is None  # cross-attention, or pooled tokens
    assert WHOLE.query_start(tokens, tokens) is None


def test_rows_of_an_initial_mask_keep_what_any_of_the_tiles_keeps_that_they_lie_in() -> None:
    tokens, tile = 56, 8
    mask = torch.rand(1, 2, tokens // tile, 5) < 0.5
    by_token = mask.repeat_interleave(tile, 2)
    for ranks in (2, 4, 7):  # 28 tokens are no multiple of 8, 8 are
        for rank, rows in enumerate(by_token.tensor_split(ranks, 2)):
            here = Shard(query_ranks=Ranks(rank, ranks)).own_queries(mask, rows.shape[2], tokens, tile)
            want = torch.stack([rows[:, :, i : i + tile].all(2) for i in range(0, rows.shape[2], tile)], 2)
            assert torch.equal(here, want)


def test_an_initial_mask_of_the_queries_here_is_refused() -> None:
    with pytest.raises(ValueError, match=r"initial_mask: expected 4 q-tiles, .* got 2"):
        Shard(query_ranks=Ranks(1, 2)).own_queries(torch.zeros(1, 1, 2, 4, dtype=torch.bool), 16, 32, 8)


# ---- states --------------------------------------------------------------------------------------------------------

TABLE = torch.tensor([-1.0, -2.0, -3.0, -4.0]).view(1, 1, 4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_takes_its_own_of_what_is_the_whole_models(rank: int) -> None:
    asked: list[Site] = []

    def by_head(of: Site) -> torch.Tensor:
        asked.append(of)
        return TABLE

    def initial_mask(of: Site) -> torch.Tensor:
        asked.append(of)
        return (torch.arange(4) == 2).view(1, 4, 1, 1).expand(1, 4, 4, 4)

    settings = SkipSettings(by_head, tile_shape=(8, 8), initial_mask=initial_mask, max_steps=1)
    state = settings.new_state(site(2), (1, 32, 32), shard=of_heads(rank, 2))
    assert isinstance(state, SkipState)
    own = slice(2 * rank, 2 * rank + 2)
    assert state.threshold[0, 0].tolist() == TABLE[0, 0, own].tolist()
    assert state.initial_mask is not None
    assert unpack_bits(state.initial_mask, 4)[0, :, 0, 0].tolist() == [False, False] if rank == 0 else [True, False]
    assert [of.q_shape for of in asked] == [(1, 32, 4, 8)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_values_that_are_set_later_are_of_the_whole_model_too(rank: int) -> None:
    owner = nn.Linear(1, 1)
    store = StateStore(SkipSettings(tile_shape=(8, 8)), Session(), shard=lambda: of_heads(rank, 2))
    record = store.record([owner], (0,), site(2))
    state = store.state(record, (1, 32, 32), torch.device("cpu"))
    ((found, table),) = store.tables(owner, "threshold", TABLE)
    assert found is state
    assert table[0, 0].tolist() == TABLE[0, 0, 2 * rank : 2 * rank + 2].tolist()
    with pytest.raises(ValueError, match="threshold: expected one for all heads, or 4"):
        store.tables(owner, "threshold", TABLE[..., :2])
    store.remember(owner, TABLE)
    other = store.state(record, (1, 16, 16), torch.device("cpu"))
    assert isinstance(other, SkipState)
    assert other.threshold[0, 0].tolist() == table[0, 0].tolist()


def test_another_shard_has_a_state_of_its_own() -> None:
    shards = [WHOLE, of_heads(0, 2)]
    owner, store = nn.Linear(1, 1), StateStore(SkipSettings(tile_shape=(8, 8)), Session(), shard=lambda: shards[0])
    record = store.record([owner], (0,), site(4))
    whole = store.state(record, (1, 32, 32), torch.device("cpu"))
    shards.pop(0)
    record.site = replace(record.site, q_shape=(1, 32, 2, 8))
    part = store.state(record, (1, 32, 32), torch.device("cpu"))
    assert (whole.capacity[1], part.capacity[1]) == (4, 2)


# ---- who tells -----------------------------------------------------------------------------------------------------


class Config:
    def __init__(self, ulysses: tuple[int, int] = (0, 1), ring: tuple[int, int] = (0, 1), anything: bool = False):
        self._ulysses_local_rank, self.ulysses_degree = ulysses
        self._ring_local_rank, self.ring_degree = ring
        self.ulysses_anything = anything


class Whole:
    def __init__(self, **configs: object):
        self.__dict__.update(configs)


@pytest.mark.parametrize("name", ["_parallel_config", "_cp_config"])
@pytest.mark.parametrize("nested", [True, False])
def test_the_model_is_asked_as_it_is_now(name: str, nested: bool) -> None:
    model = nn.Linear(1, 1)
    shard = shard_of(model)
    assert shard() == WHOLE
    config = Config((1, 2), (3, 4))
    object.__setattr__(model, name, Whole(context_parallel_config=config) if nested else config)
    assert shard() == Shard(Ranks(1, 2), Ranks(3, 4))


def test_uneven_heads_are_told_by_the_model() -> None:
    model = nn.Linear(1, 1)
    model.__dict__.update(_parallel_config=Config((1, 2), anything=True), config=Whole(num_attention_heads=5))
    assert shard_of(model)().own_heads("threshold", torch.arange(5), 2).tolist() == [3, 4]


def test_a_tensor_parallel_model_has_its_heads() -> None:
    class Mesh:
        def get_local_rank(self) -> int:
            return 1

        def size(self) -> int:
            return 4

        def get_group(self) -> Whole:
            return Whole(group_name="tp")

    model = nn.Linear(1, 1)
    split = Whole(context_parallel_config=None, tensor_parallel_config=Whole(_mesh=Mesh()))
    model.__dict__["_parallel_config"] = split
    assert shard_of(model)() == of_heads(1, 4)
    assert shard_of(model)().groups == ("tp", "")


def test_what_is_told_goes_before_the_model() -> None:
    assert shard_of(nn.Linear(1, 1), Shard(Ranks(1, 2)))() == of_heads(1, 2)


def test_no_group_is_refused_before_anything_is_changed() -> None:
    model = lite_attention.enable(toys.Toy(1), compile=False)
    before = store_of(model)
    with pytest.raises(ValueError, match=r"process_group: expected a torch.distributed.ProcessGroup, got int"):
        lite_attention.enable(model, compile=False, process_group=2)  # type: ignore[arg-type]
    assert store_of(model) is before is not None


def test_a_model_that_is_gone_has_no_part() -> None:
    shard = shard_of(nn.Linear(1, 1))
    assert shard() == WHOLE
