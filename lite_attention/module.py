"""`LiteAttention`: skip-aware attention as a module, one for each attention layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from lite_attention.module_options import ModuleOptions
from lite_attention.ops import DEFAULT_SLOTS, ResidualState, default_session, tile_shape
from lite_attention.ops.arguments import check_choice, check_count, check_switch, require
from lite_attention.ops.methods import METHODS
from lite_attention.ops.option_names import takes_options
from lite_attention.ops.quantization import quantization_of
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import FakeTensor
from lite_attention.ops.validate import check_inputs, is_bshd
from lite_attention.site_module import SiteModule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lite_attention.parallel.key_gather import Keys


__all__ = ["LiteAttention"]

_log = logging.getLogger("lite_attention")

_NOT_ALLOCATED = (
    "LiteAttention is being traced without a skip state that fits: call .allocate(batch, seq_len, heads, head_dim, "
    "dtype=..., device=...) on it beforehand"
)


class LiteAttention(SiteModule):
    """Attention that remembers from one denoising step to the next which tiles do not matter, and skips them.

    Make one per attention layer. Its memory, `state`, is allocated by the first eager call, or beforehand by
    `allocate`, which compiled and exported models need. A copy, shallow or deep, has a memory of its own. One thread
    at a time calls it. It follows `lite_attention.branch` and `lite_attention.reset`; where nothing tells when a
    generation ends, it warns.

    Args:
        enable_skipping: False computes everything and learns nothing, until `enable_skip_optimization(True)`.
        threshold: of method "votes": log2 units, at most 0; more negative skips less. A number, or a tensor that
            broadcasts to (slots, steps, heads). None = -10.
        use_int8: compute scores, and so votes, from INT8 queries and keys. On a GPU the head dims that its table in
            `lite_attention.ops.targets` has; on the CPU, for comparison, all.
        use_fp8: with `use_int8`, multiply weights and values in FP8 (e4m3) too; votes stay the same.
        quantization: the same by name: "int8", or "int8_fp8".
        num_steps: denoising steps of a generation, after which the next call starts fresh. None: call
            `reset_skip_state` between generations.
        slots: branches (cond, uncond, ...) that have a memory of their own; see `lite_attention.branch`.
        refresh: every so many steps starts fresh.
        auto_step: the op counts calls as steps. `lite_attention.branch(name, step=...)` turns it off by itself.
        initial_mask: bool (batch or 1, heads or 1, q_tiles, k_tiles), True = skipped from the start.
        persistent_state: save the state in the `state_dict` of a model that holds this module.
        allow_positive: of method "votes": accept thresholds above 0.
        implementation: None, "reference" for the CPU kernel on any device, or "portable" for the kernel of all GPUs
            from Ampere on where there is another.
        method: "votes" skips tiles that every row of a q-tile votes out; "residual" keeps a share of the tiles, and
            what the others gave.
        keep: of method "residual", as are the others below, see `lite_attention.ops.residual_settings`: the share of
            tiles that a sparse step computes. None = 0.3.
        full_every: every so many steps computes everything; None = 3.
        first_full: so many steps at the beginning do too; None = 2.
        decide_every: every so many full steps decide which tiles are kept; None = 2.
        forecast: extend what skipped tiles gave along the flow's time, see `lite_attention.branch`; None = True.
        residual_dtype: "fp8", "bf16" or "fp32"; None = "fp8" on CUDA, else "bf16".
        memory: where residuals live, "device" or "host"; None = "device".
        process_group: ranks that share the tokens of a sequence, and exchange them for heads around each call, which is
            a collective then, see `lite_attention.parallel`. Options are of the whole; `state` is of this rank.
        key_group: ranks that gather keys instead, or besides, where heads are too few.
        parts: with a process group: compute the heads of a rank in so many, each with a state, so that the exchange of
            one runs beside attention of another.
        balance: with a process group, deal heads to ranks by what they cost: with method "votes" as the calls before
            tell it, else as `lite_attention.parallel.deal_heads` is told. What is saved with `persistent_state` keeps
            them as they come.

    Raises:
        ValueError: an option out of range, or one of the other method.
    """

    @takes_options()
    def __init__(
        self,
        enable_skipping: bool = True,
        threshold: float | torch.Tensor | None = None,
        use_int8: bool = False,
        num_steps: int | None = None,
        *,
        use_fp8: bool = False,
        quantization: Literal["none", "int8", "int8_fp8"] = "none",
        slots: int = DEFAULT_SLOTS,
        refresh: int | None = None,
        auto_step: bool = True,
        initial_mask: torch.Tensor | None = None,
        persistent_state: bool = False,
        allow_positive: bool = False,
        implementation: str | None = None,
        method: Literal["votes", "residual"] = "votes",
        keep: float | torch.Tensor | None = None,
        full_every: int | None = None,
        first_full: int | None = None,
        decide_every: int | None = None,
        forecast: bool | None = None,
        residual_dtype: Literal["fp8", "bf16", "fp32"] | None = None,
        memory: Literal["device", "host"] | None = None,
        process_group: ProcessGroup | None = None,
        key_group: ProcessGroup | None = None,
        parts: int = 1,
        balance: bool = True,
    ) -> None:
        super().__init__()
        self._options = ModuleOptions.of(
            method,
            votes={"threshold": threshold, "allow_positive": allow_positive or None},
            residual={
                "keep": keep, "full_every": full_every, "first_full": first_full, "decide_every": decide_every,
                "forecast": forecast, "residual_dtype": residual_dtype, "memory": memory,
            },
            common={
                "num_steps": num_steps, "slots": slots, "refresh": refresh, "auto_step": auto_step,
                "initial_mask": initial_mask, "persistent": persistent_state,
            },
        )  # fmt: skip
        check_switch("enable_skipping", enable_skipping)
        check_switch("balance", balance)
        check_choice("implementation", implementation, METHODS[method].implementations)
        self.skipping_enabled = enable_skipping
        self.quantization = quantization_of(use_int8, use_fp8, quantization)
        self.implementation = implementation
        require(parts == 1 or not persistent_state, "parts", "1 where a state is saved", parts)
        if process_group is not None or key_group is not None or parts != 1:
            from lite_attention.parallel.module_exchange import ModuleExchange  # most run in one process

            balance = balance and not persistent_state
            self.exchange = ModuleExchange(process_group, key_group, parts, balance, learns=method == "votes")

    def allocate(
        self,
        batch: int,
        seq_len: int,
        heads: int,
        head_dim: int,
        *,
        kv_seq_len: int | None = None,
        value_dim: int | None = None,
        kv_heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LiteAttention:
        """Allocate a fresh state for calls of up to this size, and return self.

        With a process group, tokens and heads are those of all ranks.

        Args:
            batch: batch size, at most.
            seq_len: query tokens, at most.
            heads: query heads, exactly.
            head_dim: width of a head; with dtype, device and quantization it decides the tile sizes.
            kv_seq_len: key tokens, at most; None = as many as queries.
            value_dim: width of a value vector; None = that of a head. Only residuals need it.
            kv_heads: heads of the key; None = as many as of the query. Only a process group needs them.
            dtype: dtype of the query.
            device: device of the query.

        Raises:
            ValueError: a size or an option out of range, or a head dim that the device cannot quantize.
        """
        seq_k = seq_len if kv_seq_len is None else kv_seq_len
        if self.exchange is not None:
            require(seq_k == seq_len, "kv_seq_len", f"{seq_len}, as of one sequence, with a process group", seq_k)
            heads, seq_len = self.exchange.prepare(heads, heads if kv_heads is None else kv_heads, seq_k, device)
        sizes = {"batch": batch, "seq_q": seq_len, "seq_k": seq_k, "heads": heads}
        value_dim = head_dim if value_dim is None else value_dim
        self._use(self._new_states(sizes, head_dim, value_dim, dtype, device))
        return self

    def _new_states(
        self, sizes: dict[str, int], head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> list[SiteState]:
        head_dim = check_count("head_dim", head_dim)
        tile_m, tile_n = tile_shape(head_dim, dtype, device, self.quantization, self.implementation)
        sizes, exchange = {**sizes, "tile_m": tile_m, "tile_n": tile_n}, self.exchange
        if exchange is None:
            return [self._options.new_state(sizes, value_dim, device)]
        seq_k = sizes["seq_k"]
        options = [exchange.own_options(self._options, part, seq_k, tile_m) for part in range(exchange.parts)]
        states = [of_part.new_state(sizes, value_dim, device) for of_part in options]
        for part, state in enumerate(states):
            state.hold_place(exchange.part_words(part, seq_k))
            state.is_dealt = exchange.is_dealt
        return states

    def _use(self, states: list[SiteState]) -> None:
        self._adopt(states)
        if self.exchange is not None:
            self.exchange.adopt(self._options, states)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None = None,
        return_softmax_lse: bool = False,
        must_do_list: Sequence[int] | None = None,
        must_skip_list: Sequence[int] | None = None,
        key_lengths: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        seq_len: int | None = None,
    ) -> Any:
        """Attend.

        With a process group, query, key and value are the part of this rank, as `torch.tensor_split` cuts the tokens,
        and so is what is returned. Masks, ranges and lengths are of the whole sequence.

        Args:
            query: (batch, seq_len, heads, head_dim).
            key: (batch, kv_seq_len, kv_heads, head_dim).
            value: (batch, kv_seq_len, kv_heads, value_dim).
            scale: factor of the scores; None = head_dim ** -0.5.
            return_softmax_lse: also return the log-sum-exp.
            must_do_list: token ranges [start, end, ...] on the key axis that are always computed.
            must_skip_list: token ranges that take no part, exact to the token.
            key_lengths: int (batch,), valid keys of each sample.
            key_mask: bool (batch or 1, kv_seq_len), True = the key takes part.
            seq_len: with a process group: tokens of all ranks; None = as many on each as here.

        Returns:
            out (batch, seq_len, heads, value_dim), and with `return_softmax_lse` lse float32 (batch, heads, seq_len).

        Raises:
            ValueError: an argument does not fit.
            RuntimeError: no memory for its state, traced without a state that fits (call `allocate` first), a gradient
                is required, or another thread is inside a call.
        """
        options: dict[str, Any] = {
            "scale": scale, "must_do": must_do_list, "must_skip": must_skip_list, "key_lengths": key_lengths,
            "key_mask": key_mask,
        }  # fmt: skip
        if self.exchange is None:
            require(seq_len is None, "seq_len", "None without a process group", seq_len)
            return self._attend(query, key, value, return_lse=return_softmax_lse, **options)
        if self.state is None and torch.compiler.is_compiling():
            raise RuntimeError(_NOT_ALLOCATED)
        qkv = (query, key, value)
        tokens = self.exchange.tokens(*qkv, seq_len, self.states, self._room_for)
        attend = partial(self._attend, **options)
        return self.exchange.attend(attend, *qkv, tokens, self.states, return_softmax_lse)

    def _room_for(self, qkv: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Make states that fit, unless those there are do, and return what puts them to use."""
        states = self.states
        if not states or not self._fits(states[0], *qkv):
            return partial(self._use, self._states_for(*qkv))
        return lambda: None

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: int = 0, keys: Keys | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        state = self.state if part == 0 else self.states[part]
        if state is None or not self._fits(state, query, key, value):
            if torch.compiler.is_compiling():
                raise RuntimeError(_NOT_ALLOCATED)
            state = self._new_state_for(query, key, value)
        if keys is not None:
            keys.place(state)
        return METHODS[self._options.method].attend(
            query, key, value, state, quantization=self.quantization, implementation=self.implementation, **options
        )

    def _fits(self, state: SiteState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        if not (is_bshd(query) and is_bshd(key)):
            return False
        if isinstance(state, ResidualState) and value.shape[-1] != state.value_dim:
            return False
        batch, heads, seq_q, seq_k = state.capacity
        sizes = (query.shape[0], query.shape[1], key.shape[1])
        if state.initial_mask is not None and sizes != (batch, seq_q, seq_k):
            return False  # tiles of another length are other tiles
        return (
            sizes[0] <= batch and sizes[1] <= seq_q and sizes[2] <= seq_k and query.shape[2] == heads
            and (state.tile_m, state.tile_n)
            == tile_shape(query.shape[3], query.dtype, query.device, self.quantization, self.implementation)
            and state.is_usable_with(query)
        )  # fmt: skip

    def _new_state_for(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> SiteState:
        check_inputs(query, key, value)  # a call in error must not cost the old state
        if isinstance(query, FakeTensor):  # shapes alone are asked for; what the mode makes is of no use after it
            with query.fake_mode:
                return self._options.passing_state(query, key, value, self.quantization, self.implementation)
        self._use(self._states_for(query, key, value))
        assert self.state is not None
        return self.state

    def _states_for(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[SiteState]:
        if self.state is not None:
            _log.info(
                "LiteAttention: q %s %s on %s does not fit %s; starting a fresh skip state",
                tuple(query.shape), query.dtype, query.device, self.state,
            )  # fmt: skip
        elif self.num_steps is None and self._options.of_state["auto_step"] and not self._is_told:
            default_session.say_unknown()
        batch, seq_q, heads, head_dim = query.shape
        sizes = {"batch": batch, "seq_q": seq_q, "seq_k": key.shape[1], "heads": heads}
        return self._new_states(sizes, head_dim, value.shape[3], query.dtype, query.device)

    def set_threshold(self, threshold: float | torch.Tensor) -> None:
        """Set the threshold, in place on the device: neither a recompile nor a new graph.

        Raises:
            ValueError: NaN, above 0 without `allow_positive`, or a table that does not fit the state; or the method has
                no thresholds.
        """
        self.set_value("threshold", threshold)

    def set_keep(self, keep: float | torch.Tensor) -> None:
        """Set the share of tiles that sparse steps compute, in place: neither a recompile nor a new graph.

        Raises:
            ValueError: no share above 0 and at most 1, or more steps than the state has; or the method keeps none.
        """
        self.set_value("keep", keep)

    def check_value(self, name: Literal["threshold", "keep"], value: float | torch.Tensor) -> None:
        """Raise what `set_threshold` or `set_keep` would raise, and change nothing."""
        self._options.check_value(name, self._own(name, value, 0), self.state)

    def set_value(self, name: Literal["threshold", "keep"], value: float | torch.Tensor) -> None:
        """Set the threshold, or the share to keep."""
        self.check_value(name, value)
        self._options.remember(value)
        for part, state in enumerate(self.states):
            self._options.write(self._own(name, value, part), state)
        if self.exchange is not None:
            self.exchange.hold(self._options, self.states)

    def _own(self, name: str, value: float | torch.Tensor, part: int) -> Any:
        """Return what of a threshold is of the heads of a state."""
        exchange = None if self.state is None or name != "threshold" else self.exchange
        return value if exchange is None else exchange.own(name, value, part)

    def extra_repr(self) -> str:
        """Return the options that matter most."""
        shown = f"enable_skipping={self.skipping_enabled}, {self._options}, num_steps={self.num_steps}"
        return shown if self.quantization == "none" else f"{shown}, quantization={self.quantization}"
