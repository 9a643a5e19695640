"""Saved states of parts of a site: joined to that of the whole, which is cut to any other parts.

What heads and queries have of a state lies beside each other in its tensors, so both are copies. All else is alike on
all ranks. In `control` two words of queries are those of a part: where they stand, and how many the last call had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lite_attention.ops import control as c
from lite_attention.ops.arguments import check_has_values, require
from lite_attention.ops.part import Part
from lite_attention.ops.tiles import ceil_div

__all__ = ["Saved", "check_same_thresholds", "joined", "masked_by_head", "own_part", "whole_sizes"]

Saved = Mapping[str, torch.Tensor]

# The dims of heads and of queries, None without queries.
_DIMS: dict[str, tuple[int, int | None]] = {
    "skip_mask": (-3, -2),
    "initial_mask": (-3, -2),
    "threshold": (-1, None),
    "residual": (-3, -2),
    "residual_scale": (-2, -1),
    "row_lse": (-2, -1),
}
_IN_TILES = {"skip_mask", "initial_mask"}
_HEADS, _SEQ_Q, _TILE_M = 1, 2, 4  # of the geometry


def own_part(saved: Saved, place: Part | None) -> Saved:
    """Return what a state of a part of a site, None = the whole, loads: what it saved itself, or its own of the whole.

    Raises:
        ValueError: it was saved by another part, or as a whole of other sizes; or queries are no whole tiles.
    """
    of = _place_of(saved)
    if of == place:
        return saved
    if place is None or of is not None:
        expected = "all heads and queries" if place is None else f"{place}, or all"
        raise ValueError(f"part of the model: expected a state of {expected}, got that of {of}, of another process")
    whole, expected_whole = whole_sizes(saved), (place.all_heads, place.all_queries)
    require(whole == expected_whole, "geometry (heads, seq_q)", f"{expected_whole}, of the whole model", whole)
    tile_m = int(saved["geometry"][_TILE_M])
    _check_tiles(place, tile_m)
    own = {name: _cut(name, x, place, tile_m) for name, x in saved.items()}
    own["geometry"][[_HEADS, _SEQ_Q]] = torch.tensor([len(place.heads), place.queries])
    own["control"] = _control_of(saved["control"], place.query_start, place.all_queries, place.queries)
    return {**own, "part": place.words()}


def joined(parts: Sequence[Saved]) -> Saved:
    """Return the state of a whole site from those of all its parts, in the model's order of heads.

    Raises:
        ValueError: heads and queries are missing, or there twice; or what is to be alike differs; or queries are no
            whole tiles.
    """
    places = [_place_of(saved) for saved in parts]
    known = [place for place in places if place is not None]
    first = parts[0]
    if not known:
        return first  # each has the whole
    require(len(known) == len(parts), "process_group", "parts of one model", "some that have all of it")
    tile_m = int(first["geometry"][_TILE_M])
    for saved, place in zip(parts, known, strict=True):
        _check_alike(first, saved, known[0], place)
    _check_whole(known, tile_m)
    whole = {name: _room(name, x, known[0], tile_m) for name, x in first.items() if name != "part"}
    whole["geometry"][[_HEADS, _SEQ_Q]] = torch.tensor([known[0].all_heads, known[0].all_queries])
    for saved, place in zip(parts, known, strict=True):
        for name in _DIMS.keys() & saved.keys():
            _put(name, whole[name], saved[name], place, tile_m)
    whole["control"] = _whole_control(first["control"], known[0])
    return whole


def masked_by_head(saved: Saved, own: Saved) -> Saved:
    """Return a saved state with an initial mask for as many heads, or one for all, as a state has.

    A part of one head does not tell which of these its mask is.
    """
    mask, like = saved.get("initial_mask"), own.get("initial_mask")
    if mask is None or like is None or mask.dim() != 4 or mask.shape[1] == like.shape[1]:
        return saved
    if mask.shape[1] == 1:
        return {**saved, "initial_mask": mask.expand(-1, like.shape[1], -1, -1)}
    is_one = like.shape[1] == 1 and bool((mask == mask[:, :1]).all())
    return {**saved, "initial_mask": mask[:, :1]} if is_one else saved


def check_same_thresholds(saved: Saved, own: Saved) -> None:
    """Raise ValueError if thresholds by head differ from those of a state whose heads are dealt anew.

    The next deal would give heads what its module has for them.
    """
    place = _place_of(own)
    there, here = (of.get("threshold") for of in (own_part(saved, place), own))
    if there is None or here is None or there.shape != here.shape or torch.equal(there.to(here.device), here):
        return
    given = [x for x in (saved["threshold"], here) if bool((x != x[..., :1]).any())]
    expected = "those by head that the module has, which deals its heads: call its set_threshold() first"
    require(not given, "threshold", expected, saved["threshold"].unique().tolist())


# ---- places ----------------------------------------------------------------------------------------------------------


def whole_sizes(saved: Saved) -> tuple[int, int]:
    """Return heads and queries of the whole site that a saved state is, or is a part of.

    Raises:
        ValueError: it is no saved state.
    """
    place = _place_of(saved)
    if place is not None:
        return place.all_heads, place.all_queries
    heads, queries = saved["geometry"][[_HEADS, _SEQ_Q]].tolist()
    return heads, queries


def _place_of(saved: Saved) -> Part | None:
    require("geometry" in saved, "state_dict", "a state, with its geometry", sorted(saved))
    for name, least, most in (("geometry", 6, 6), ("part", 4, None)):
        x = saved.get(name)
        if x is not None:
            check_has_values(name, x)
            fits = x.dim() == 1 and not x.is_floating_point() and least <= len(x) <= (most or len(x))
            require(fits, name, f"{least} integers{'' if most else ' or more'}", tuple(x.shape))
    return Part.of_words(saved["part"], int(saved["geometry"][_SEQ_Q])) if "part" in saved else None


def _check_tiles(place: Part, tile_m: int) -> None:
    ends = [place.query_start, place.rows.stop]
    is_whole = all(end % tile_m == 0 or end == place.all_queries for end in ends)
    require(is_whole, "queries", f"parts of whole tiles of {tile_m}, which alone can be joined or cut", str(place))


def _check_whole(places: Sequence[Part], tile_m: int) -> None:
    all_heads, all_queries = places[0].all_heads, places[0].all_queries
    for place in places:
        _check_tiles(place, tile_m)
        alike = (place.all_heads, place.all_queries) == (all_heads, all_queries)
        require(alike, "process_group", f"parts of {all_heads} heads and {all_queries} queries", str(place))
    times = torch.zeros(all_heads, ceil_div(all_queries, tile_m), dtype=torch.int64, device="cpu")
    for place in places:
        times[list(place.heads), _rows("skip_mask", place, tile_m)] += 1
    got = "; ".join(map(str, places))
    expected = "ranks that have each head and query once, of modules with parts=1"
    require(bool((times == 1).all()), "process_group", expected, got)


def _rows(name: str, place: Part, tile_m: int) -> slice:
    rows = place.rows
    return (
        slice(rows.start // tile_m, ceil_div(rows.stop, tile_m)) if name in _IN_TILES else slice(rows.start, rows.stop)
    )


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x  # of which torch copies no rows


def _cut(name: str, x: torch.Tensor, place: Part, tile_m: int) -> torch.Tensor:
    if name not in _DIMS:
        return x.clone()
    heads, queries = _DIMS[name]
    whole, rows = place._replace(query_start=0, queries=place.all_queries), _rows(name, place, tile_m)
    fits = x.dim() >= 3 and (queries is None or x.shape[queries] == _rows(name, whole, tile_m).stop)
    fits = fits and x.shape[heads] in (place.all_heads, 1 if name == "initial_mask" else place.all_heads)
    require(fits, name, f"{place.all_heads} heads and {place.all_queries} queries", tuple(x.shape))
    if queries is not None:
        x = x.narrow(queries, rows.start, rows.stop - rows.start)
    if x.shape[heads] == 1 < place.all_heads:  # an initial mask of all heads
        return x
    return _bits(x).index_select(heads, torch.tensor(place.heads, device=x.device)).view(x.dtype)


def _room(name: str, x: torch.Tensor, place: Part, tile_m: int) -> torch.Tensor:
    """Return a tensor of the whole for what is of a part in `x`."""
    if name not in _DIMS:
        return x.clone()
    shape, (heads, queries) = [*x.shape], _DIMS[name]
    if shape[heads] == len(place.heads):
        shape[heads] = place.all_heads
    if queries is not None:
        shape[queries] = ceil_div(place.all_queries, tile_m) if name in _IN_TILES else place.all_queries
    return x.new_empty(shape)


def _put(name: str, whole: torch.Tensor, x: torch.Tensor, place: Part, tile_m: int) -> None:
    heads, queries = _DIMS[name]
    into = whole
    if queries is not None:
        rows = _rows(name, place, tile_m)
        into = whole.narrow(queries, rows.start, rows.stop - rows.start)
    if whole.shape[heads] == x.shape[heads]:
        into.copy_(x)
    else:
        _bits(into).index_copy_(heads, torch.tensor(place.heads, device=x.device), _bits(x))


# ---- control ---------------------------------------------------------------------------------------------------------


def _whole_control(control: torch.Tensor, place: Part) -> torch.Tensor:
    return _control_of(control, None, place.queries, place.all_queries)


def _control_of(control: torch.Tensor, query_start: int | None, queries: int, then: int) -> torch.Tensor:
    """Return control words of calls of `then` queries, from those of calls of so many.

    Raises:
        ValueError: the latest call of a slot had fewer, which the parts of `then` share in another way.
    """
    if queries == then:
        return control.clone()
    words = c.control_list(control)
    words[c.QUERY_START] = 0 if query_start is None else 1 + query_start
    for word in range(c.slot_word(0, c.SEQ_Q), len(words), c.SLOT_WORDS):
        require(words[word] in (0, queries), "seq_q of the latest call", f"{queries}, to be joined or cut", words[word])
        words[word] = then if words[word] else 0
    return torch.tensor(words, dtype=control.dtype, device=control.device)


def _check_alike(first: Saved, saved: Saved, first_place: Part, place: Part) -> None:
    require(first.keys() == saved.keys(), "process_group", f"states of {sorted(first)} on all ranks", sorted(saved))
    for name in ("geometry", *(name for name in first if name not in ("geometry", "part"))):
        one, other = (_but_part(name, x, of) for x, of in ((first[name], first_place), (saved[name], place)))
        alike = one.shape == other.shape and torch.equal(*(x.contiguous().view(torch.uint8) for x in (one, other)))
        require(alike, name, f"the same on all ranks, which do the same calls: {one.tolist()}", other.tolist())


def _but_part(name: str, x: torch.Tensor, place: Part) -> torch.Tensor:
    """Return what of a saved tensor is alike on all ranks; of one that is by heads, its other sizes."""
    if name == "control":
        return _whole_control(x, place)
    if name == "geometry":
        return x[[i for i in range(len(x)) if i not in (_HEADS, _SEQ_Q)]]
    if name not in _DIMS:
        return x
    shared = {dim % x.dim() for dim in _DIMS[name] if dim is not None}
    return torch.tensor([size for dim, size in enumerate(x.shape) if dim not in shared], device="cpu")
