"""Tokens that are never skipped, and whose own attention skips nothing: text, audio, references beside a video.

They keep their tiles: behind each forward, the bits of all tiles that hold one of them, as a query or as a key, are
taken out of the masks. So no op knows of them, and compiled code is the same with and without.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from lite_attention.ops.arguments import require
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.shard import WHOLE, Shard
from lite_attention.ops.site import Site
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.threads import PerThread
from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.torch_internals import fake_mode_of
from lite_attention.token_layout import Layout, Ranges, layout_of_call, tells_layout
from lite_attention.token_slices import TokenSlice, check_slices, ranges_of

if TYPE_CHECKING:
    from lite_attention.compile.records import SiteRecord, StateKey
    from lite_attention.compile.store import StateStore

__all__ = [
    "ExactTokenOption",
    "check_exact_tokens",
    "exact_slices",
    "exactly",
    "keep_exact",
    "kept_exact",
]

_Slices = Sequence[Sequence[int | None]]

# "auto"; or slices of the sequence of each site; or a callable that is given a `Site` and returns one of the two.
ExactTokenOption = Literal["auto"] | _Slices | Callable[[Site], Literal["auto"] | _Slices | None]

_T = TypeVar("_T")


def check_exact_tokens(given: object, token_order: object = None) -> None:
    """Check what a user names as exact tokens.

    Raises:
        ValueError: neither None, "auto", slices that may hold a token, nor a callable; or tokens are named where a
            token order puts others.
    """
    if given is not None and not callable(given):
        exact_slices(given)
    is_open = given is None or given == "auto"
    require(is_open or token_order is None, "exact_tokens", "'auto' or None with token_order", repr(given))


def exact_slices(given: object) -> Literal["auto"] | tuple[TokenSlice, ...]:
    """Return "auto", or the slices that an argument holds.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(given, str):
        require(given == "auto", "exact_tokens", "'auto', or a list of pairs [start, end]", repr(given))
        return "auto"
    return () if given is None else check_slices("exact_tokens", given)


def kept_exact(
    model: nn.Module, store: StateStore, option: ExactTokenOption | None, run: Callable[..., Any]
) -> tuple[Callable[..., Any], list[Callable[[Sequence[Any], Mapping[str, Any]], None]]]:
    """Return what runs a model with its exact tokens kept, and what is to look at the arguments before it does."""
    if option is None or (option == "auto" and not tells_layout(model)):
        return run, []
    exact = ExactTokens(model, store, option)
    return exact.around(run), [exact.look]


# ---- keeping them ----------------------------------------------------------------------------------------------------


def keep_exact(state: SiteState, ranges: Ranges, shard: Shard = WHOLE) -> None:
    """Let the next call of a state compute all tiles that hold a token of some ranges, as a query or as a key.

    Args:
        state: at the sizes that it has room for.
        ranges: (start, end) in the sequence of the keys; the queries are those of the same tokens.
        shard: which of them are here.
    """
    may_skip = _may_skip(state, ranges, shard)
    state.skip_mask.bitwise_and_(may_skip)
    if state.initial_mask is not None:
        state.initial_mask.bitwise_and_(may_skip)


def exactly(state: SiteState, ranges: Ranges, attend: Callable[[], _T]) -> _T:
    """Return what attention with a state gives, with the tiles of exact tokens in it, now and at the next call.

    Args:
        state: of the call.
        ranges: as `keep_exact` takes them; a state that kept others starts fresh.
        attend: attends with the state.
    """
    if ranges != _kept(state):
        keep_exact(state, ranges)
        state.start_fresh()
    result = attend()
    if ranges:
        keep_exact(state, ranges)
    return result


class _Made(NamedTuple):
    """The words of a state, and what they were made of."""

    ranges: Ranges
    shard: Shard
    words: torch.Tensor


_made: weakref.WeakKeyDictionary[SiteState, _Made] = weakref.WeakKeyDictionary()


def _kept(state: SiteState) -> Ranges:
    return _made[state].ranges if state in _made else ()


def _may_skip(state: SiteState, ranges: Ranges, shard: Shard) -> torch.Tensor:
    """Return the words [q_tiles, k_words] of the tiles without any of the tokens; made once for each state."""
    made, device = _made.get(state), state.skip_mask.device
    if made is not None and made[:2] == (ranges, shard) and made.words.device == device:
        return made.words
    _, _, seq_q, seq_k = state.capacity
    keys = torch.zeros(seq_k, dtype=torch.bool, device="cpu")
    for start, end in ranges:
        keys[start:end] = True
    first = 0 if seq_q == seq_k else shard.query_start(seq_q, seq_k)
    queries = keys.new_zeros(seq_q) if first is None else keys[first : first + seq_q]
    rows, columns = _any_of(queries, state.tile_m), _any_of(keys, state.tile_n)
    words = pack_bits(~(rows[:, None] | columns)).to(device)
    _made[state] = _Made(ranges, shard, words)
    return words


def _any_of(tokens: torch.Tensor, tile: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(tokens, (0, ceil_div(len(tokens), tile) * tile - len(tokens)))
    return padded.view(-1, tile).any(1)


class ExactTokens:
    """Keeps the exact tokens of an enabled model.

    Args:
        model: the model; it is not kept alive.
        store: its sites and states.
        option: which tokens, for all its sites.
    """

    def __init__(self, model: nn.Module, store: StateStore, option: ExactTokenOption | None) -> None:
        self._model, self._store, self._option = weakref.ref(model), store, option
        self._layout: PerThread[list[Layout | None]] = PerThread(lambda: [None])
        self._slices: weakref.WeakKeyDictionary[SiteState, Literal["auto"] | tuple[TokenSlice, ...]]
        self._slices = weakref.WeakKeyDictionary()
        store.on_birth = self._on_birth

    def look(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note the layout of a forward that is about to run; states that were of another one start fresh."""
        is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if is_capturing or fake_mode_of([*args, *kwargs.values()]) is not None:
            return  # reading it waits for the device, and fake tensors hold nothing to read
        here, layout = self._layout(), self._layout_of_call(args, kwargs)
        before, here[0] = here[0], layout
        if layout is None or before is None or layout == before:
            return
        for record in self._store.records:
            for key, state in self._states(record):
                if layout.fits(key[0][2]) and self._ranges(key, state) != _kept(state):
                    self._keep(record, key, state)
                    state.start_fresh()

    def _layout_of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout | None:
        from lite_attention.parallel.shard import context_parallel_of

        model = self._model()
        layout = layout_of_call(model, args, kwargs)
        if layout is None or layout.is_one or context_parallel_of(model) is None:
            return layout
        if self._option == "auto":
            self._store.say(
                f"text of {type(model).__name__} is skipped as the picture is, since processes split the two apart "
                "with enable_parallelism(); exact_tokens=None says that it may be"
            )
        return None

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs the model, and takes the tiles of exact tokens out of the masks behind it."""

        def run_exactly(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            session, ran = id(self._store.session), self._store.forward.ran  # of this thread
            for record in self._store.records:
                if id(record) in ran:
                    for key, state in self._states(record):
                        if state is record.recent.get(session):
                            self._keep(record, key, state)
            return result

        return run_exactly

    def _states(self, record: SiteRecord) -> list[tuple[StateKey, SiteState]]:
        """Return the states of a site in this thread."""
        session = id(self._store.session)
        return [(key, state) for key, state in [*record.states.items()] if key[3] == session]

    def _on_birth(self, record: SiteRecord, key: StateKey, state: SiteState, site: Site) -> None:
        self._slices[state] = exact_slices(self._option(site) if callable(self._option) else self._option)
        self._keep(record, key, state)

    def _keep(self, record: SiteRecord, key: StateKey, state: SiteState) -> None:
        record.exact_tokens = self._ranges(key, state)
        if record.exact_tokens or _kept(state):
            keep_exact(state, record.exact_tokens, key[4])

    def _ranges(self, key: StateKey, state: SiteState) -> Ranges:
        """Return the ranges of exact tokens in the sequence of a state."""
        tokens, slices = key[0][2], self._slices[state]
        if slices != "auto":
            return tuple(ranges_of(slices, tokens))
        layout = self._layout()[0]
        return () if layout is None else layout.ranges(tokens)
