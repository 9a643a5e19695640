"""What a user decides about swapping attention, for torch.compile, torch.export and eager alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, TypedDict

import torch

from lite_attention.ops import DEFAULT_SLOTS, DEFAULT_THRESHOLD, tile_shape
from lite_attention.ops.arguments import check_choice, check_count, require
from lite_attention.ops.buffers import Buffers, Sizes, residual_buffers, vote_buffers
from lite_attention.ops.methods import METHODS
from lite_attention.ops.options import RESIDUAL_DTYPES
from lite_attention.ops.quantization import QuantizationName, quantization_of
from lite_attention.ops.residual_settings import UNKNOWN_STEPS, ResidualSettings, residual_of
from lite_attention.ops.residual_state import ResidualState
from lite_attention.ops.shard import WHOLE, Shard
from lite_attention.ops.site import Site, SiteKeep, SiteThreshold, Threshold
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.state import SkipState
from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.torch_internals import holds_unless_unknown
from lite_attention.ops.validate import check_threshold

__all__ = ["CommonOptions", "OtherOptions", "SkipOptions", "SkipSettings", "check_compiling", "check_options_of_torch"]


class CommonOptions(TypedDict, total=False):
    """The fields of `SkipSettings` but threshold, keep and number of steps, which some take in ways of their own."""

    slots: int
    refresh: int | None
    select: Callable[[Site], bool | None] | None
    min_tiles: int
    tile_shape: tuple[int, int] | None
    initial_mask: Callable[[Site], torch.Tensor | None] | None
    max_steps: int
    quantization: QuantizationName
    use_int8: bool
    use_fp8: bool
    implementation: Literal["reference", "portable"] | None
    dense: Literal["sdpa", "kernel"]
    allow_positive: bool
    method: Literal["votes", "residual"]
    full_every: int | None
    first_full: int | None
    decide_every: int | None
    forecast: bool | None
    residual_dtype: Literal["fp8", "bf16", "fp32"] | None
    memory: Literal["device", "host"] | None


class OtherOptions(CommonOptions, total=False):
    """The fields of `SkipSettings` but threshold and keep, which `enable` takes as a table or a file too."""

    num_steps: int | None


class SkipOptions(OtherOptions, total=False):
    """The fields of `SkipSettings`, as keyword arguments of all who take them."""

    threshold: SiteThreshold | None
    keep: SiteKeep | None


def check_options_of_torch(options: Mapping[str, Any] | None) -> None:
    """Check that what is meant for torch.compile(options=) is.

    Raises:
        ValueError: it is no dictionary, or has options of ours.
    """
    is_mapping = options is None or isinstance(options, Mapping)
    require(is_mapping, "options", "a dictionary of those of torch.compile", repr(options))
    ours = [name for name in options or {} if name in SkipOptions.__annotations__]
    got = f"{ours}, which enable() and LiteAttentionBackend() take by name"
    require(not ours, "options", "those of torch.compile", got)


def check_compiling(compile: object, mode: object, options: Mapping[str, Any] | None, inner: object) -> None:
    """Check how models are to be compiled, before any of them is changed.

    Raises:
        ValueError: an argument of these names is none that torch.compile or its backend could take.
    """
    is_known = isinstance(compile, int) and compile in (True, False)
    require(is_known or compile in ("blocks",), "compile", "True, False or 'blocks'", repr(compile))
    check_options_of_torch(options)
    require(mode is None or isinstance(mode, str), "mode", "a name, or None", repr(mode))
    require(mode is None or options is None, "mode", "None beside options, as of torch.compile", repr(mode))
    require(isinstance(inner, str) or callable(inner), "inner", "the name of a backend, or a callable", repr(inner))


_OF_RESIDUAL = tuple(field.name for field in fields(ResidualSettings))


@dataclass(frozen=True)
class SkipSettings:
    """Options of the swap.

    Args:
        threshold: of method "votes": log2 units, at most 0: a number, or a tensor that broadcasts to
            (slots, steps, heads), or a callable that returns one of these for a `Site` whose sizes are numbers, called
            when its state is born. None = -10.
        num_steps: denoising steps of a generation; None = unknown.
        slots: branches (cond, uncond, ...) that have a memory of their own; `enable` gives 3 unless told.
        refresh: every so many steps starts fresh; None = only the first.
        select: called with each supported `Site`: True swaps it, False leaves it alone, None = the default, which
            swaps self-attention of at least `min_tiles` k-tiles.
        min_tiles: fewest k-tiles worth a memory; with one nothing could ever be skipped.
        tile_shape: (tile_m, tile_n) instead of the table's.
        initial_mask: called with a Site whose sizes are numbers when its state is born; returns bool
            (batch or 1, heads or 1, q_tiles, k_tiles), True = skipped from the start, or None. A pattern out of
            `lite_attention.masks` is such a callable.
        max_steps: where nobody tells the step or their number, start fresh after so many calls. Without `num_steps` it
            is also the length of the longest schedule of thresholds.
        quantization: of sites that skip, see `lite_attention.ops.quantization`: "int8" computes scores, and so votes,
            from INT8 queries and keys, "int8_fp8" multiplies weights and values in FP8 (e4m3) too. Sites that the GPU
            cannot quantize stay dense; the CPU does all, for comparison.
        use_int8: the same as quantization="int8".
        use_fp8: with `use_int8`, the same as quantization="int8_fp8".
        implementation: None, "reference" for the CPU kernel on any device, or "portable" for the kernel of all GPUs
            from Ampere on where there is another; of the sites that skip.
        dense: what runs sites that do not skip: "sdpa" leaves them as they are, "kernel" puts
            `lite_attention::attention` in place of those that it computes exactly.
        allow_positive: of method "votes": accept thresholds above 0.
        method: "votes" skips tiles that every row of a q-tile votes out; "residual" keeps a share of the tiles, and
            what the others gave.
        keep: of method "residual", as are the others below, see `lite_attention.ops.residual_settings`: a number, a
            tensor (steps,), or a callable that returns one of these for a `Site`, called when its state is born. None =
            0.3.
        full_every: every so many steps computes everything; None = 3.
        first_full: so many steps at the beginning do too; None = 2.
        decide_every: every so many full steps decide which tiles are kept; None = 2.
        forecast: extend what skipped tiles gave along the flow's time; None = True.
        residual_dtype: "fp8", "bf16" or "fp32"; None = "fp8" on CUDA, else "bf16".
        memory: where residuals live, "device" or "host"; None = "device".

    Raises:
        ValueError: an option out of range, or one of the other method.
        TypeError: an option that is none of these.
    """

    threshold: SiteThreshold | None = None
    num_steps: int | None = None
    slots: int = DEFAULT_SLOTS
    refresh: int | None = None
    select: Callable[[Site], bool | None] | None = None
    min_tiles: int = 2
    tile_shape: tuple[int, int] | None = None
    initial_mask: Callable[[Site], torch.Tensor | None] | None = None
    max_steps: int = UNKNOWN_STEPS
    quantization: str = "none"
    use_int8: bool = False
    use_fp8: bool = False
    implementation: str | None = None
    dense: str = "sdpa"
    allow_positive: bool = field(default=False, repr=False)
    method: str = "votes"
    keep: SiteKeep | None = None
    full_every: int | None = None
    first_full: int | None = None
    decide_every: int | None = None
    forecast: bool | None = None
    residual_dtype: str | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        self._check_method()
        quantization = quantization_of(self.use_int8, self.use_fp8, self.quantization)
        object.__setattr__(self, "quantization", quantization)
        check_choice("implementation", self.implementation, METHODS[self.method].implementations)
        check_choice("dense", self.dense, ("sdpa", "kernel"))
        for name in ("num_steps", "slots", "refresh", "min_tiles", "max_steps"):
            value = getattr(self, name)
            if value is not None or name in ("slots", "min_tiles", "max_steps"):
                check_count(name, value)
        for name in ("select", "initial_mask"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ValueError(f"{name}: expected a callable that is given a Site, got {type(value).__name__}")
        if self.tile_shape is not None:
            sizes = self.tile_shape
            if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
                raise ValueError(f"tile_shape: expected (tile_m, tile_n), got {sizes!r}")
            for size in sizes:
                check_count("tile_shape", size)

    def _check_method(self) -> None:
        if self.residual is None:
            threshold = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
            object.__setattr__(self, "threshold", threshold)
            if not callable(threshold):
                check_threshold(threshold, allow_positive=self.allow_positive)

    @cached_property
    def residual(self) -> ResidualSettings | None:
        """The options of the method "residual"; None = the other one."""
        of_votes = {"threshold": self.threshold, "allow_positive": self.allow_positive or None}
        of_residual = {name: getattr(self, name) for name in _OF_RESIDUAL}
        if self.method == "residual" and callable(self.keep):
            of_residual["keep"] = None  # it is asked when a state is born
        return residual_of(self.method, of_votes, of_residual)

    @property
    def forecasts(self) -> bool:
        """Whether the flow's time matters."""
        return self.residual is not None and self.residual.forecast

    def check_schedule(self, threshold: Threshold) -> None:
        """Check the values and the number of steps of a threshold for states that are to come.

        Raises:
            ValueError: NaN, above 0 without `allow_positive`, or more steps than the table of a state has.
        """
        check_threshold(threshold, allow_positive=self.allow_positive)
        if isinstance(threshold, torch.Tensor) and threshold.dim() > 1 and threshold.shape[-2] > self.table_steps:
            raise ValueError(
                f"threshold: expected at most {self.table_steps} steps, as the states have, got {threshold.shape[-2]}; "
                "give num_steps= (or max_steps=, where it is unknown) of its length"
            )

    @property
    def table_steps(self) -> int:
        """Steps of the tables of every state. Compiled code is made for it: nothing that is set later changes it."""
        rows = self.threshold.shape[-2] if isinstance(self.threshold, torch.Tensor) and self.threshold.dim() > 1 else 1
        rows = rows if self.residual is None else self.residual.steps
        return max(rows, self.num_steps or self.max_steps)

    def tile_shape_for(self, site: Site) -> tuple[int, int]:
        """Return (tile_m, tile_n) for a site."""
        return self.tile_shape or self._tile_shape_of_table(site)

    def _tile_shape_of_table(self, site: Site) -> tuple[int, int]:
        return tile_shape(site.q_shape[3], site.dtype, site.device, self.quantization, self.implementation)

    def sized(self, site: Site, sizes: tuple[int, int, int], tiles: tuple[int, int]) -> Site:
        """Return a site with numbers for (batch, seq_q, seq_k) and the tiles of its state."""
        batch, seq_q, seq_k = sizes
        (_, _, heads, head_dim), (_, _, kv_heads, _), value_dim = site.q_shape, site.k_shape, site.v_shape[3]
        return replace(
            site, q_shape=(batch, seq_q, int(heads), head_dim), k_shape=(batch, seq_k, kv_heads, head_dim),
            v_shape=(batch, seq_k, kv_heads, value_dim), tile_shape=tiles,
        )  # fmt: skip

    def new_state(
        self,
        site: Site,
        sizes: tuple[int, int, int],
        value: SiteThreshold | SiteKeep | None = None,
        shard: Shard = WHOLE,
    ) -> SiteState:
        """Return a fresh state for a site at (batch, seq_q, seq_k).

        Args:
            site: as far as known.
            sizes: of the calls.
            value: the threshold, or the share to keep, in place of the settings'; as the settings' it is of the whole
                model.
            shard: which part of the model's attention the calls are.

        Raises:
            ValueError: the threshold, the share or the initial mask does not fit the site.
            RuntimeError: there is not enough memory for it.
        """
        site = self.sized(site, sizes, self.tile_shape_for(site))
        whole, heads = shard.whole(site), site.q_shape[2]
        common = self._state_options(site, shard)
        if self.residual is not None:
            options = self.residual.options(self.table_steps, site.device)
            keeping = ResidualState(**common, **options, value_dim=site.value_dim)
            self.residual.write_plan(keeping)
            keep = self.keep if value is None else value
            if keep is not None:
                keeping.set_keep(keep(whole) if callable(keep) else keep)
            return self._begun(keeping, shard)
        state = SkipState(**common, allow_positive=self.allow_positive)
        threshold = self.threshold if value is None else value
        assert threshold is not None
        threshold = threshold(whole) if callable(threshold) else threshold
        state.set_threshold(shard.own_heads("threshold", threshold, heads))
        return self._begun(state, shard)

    def _state_options(self, site: Site, shard: Shard) -> dict[str, Any]:
        """Return what the states of all methods are made with."""
        (batch, seq_q, heads, _), seq_k, (tile_m, tile_n) = site.q_shape, site.k_shape[1], site.tile_shape or (0, 0)
        mask = None if self.initial_mask is None else self.initial_mask(shard.whole(site))
        if self.initial_mask is not None and mask is None:  # one shape for all, since it is part of compiled code
            mask = torch.zeros(batch, heads, ceil_div(seq_q, tile_m), ceil_div(seq_k, tile_n), dtype=torch.bool)
        elif mask is not None and mask.dim() == 4:
            mask = shard.own_heads("initial_mask", mask, heads, dim=1)
            mask = shard.own_queries(mask, seq_q, seq_k, tile_m)
            mask = mask.expand(batch, heads, *mask.shape[2:])
        return {
            "batch": batch, "heads": heads, "seq_q": seq_q, "seq_k": seq_k, "tile_m": tile_m, "tile_n": tile_n,
            "slots": self.slots, "num_steps": self.table_steps, "refresh": self.refresh, "initial_mask": mask,
            "device": site.device,
        }  # fmt: skip

    def buffers(self, site: Site) -> Buffers:
        """Return shapes and dtypes of the buffers of a site's state, in the order of the op's arguments."""
        (batch, seq_q, heads, _), seq_k = site.q_shape, site.k_shape[1]
        sizes = Sizes(batch, heads, seq_q, seq_k, *self.tile_shape_for(site))
        common: dict[str, Any] = {
            "slots": self.slots, "steps": self.table_steps, "has_initial_mask": self.initial_mask is not None,
        }  # fmt: skip
        if self.residual is None:
            return vote_buffers(sizes, **common)
        dtype = RESIDUAL_DTYPES[self.residual.dtype_on(site.device)]
        forecast = self.residual.forecast
        return residual_buffers(sizes, **common, value_dim=site.value_dim, forecast=forecast, dtype=dtype)

    def _begun(self, state: SiteState, shard: Shard) -> SiteState:
        """Let the tables have room for more steps than a generation may have, and queries stand where they are."""
        state.set_num_steps(self.num_steps or self.max_steps)
        state.query_start = shard.query_start(*state.capacity[2:])
        if shard.place.ranks > 1:
            state.hold_place(shard.part(*state.capacity[1:]).words())
        return state

    def unsupported_reason(self, site: Site) -> str | None:
        """Return why no implementation can compute a site, None if one can."""
        reason = None
        if self.implementation != "reference":
            reason = _no_kernel_reason(
                site, self.implementation, quantization=self.quantization,
                residual="" if self.residual is None else self.residual.dtype_on(site.device),
                initial_mask=self.initial_mask is not None,
            )  # fmt: skip
        if reason is None:
            try:
                self._tile_shape_of_table(site)
            except ValueError as error:  # no such head dim for the quantization
                reason = str(error)
        return reason

    def fits_dense_kernel(self, site: Site) -> bool:
        """Return whether `lite_attention::attention` is to run a supported call, should it not skip."""
        if self.dense != "kernel" or _no_kernel_reason(site, skip=False) is not None:
            return False
        # The op refuses what is empty, scaled_dot_product_attention does not. Sizes that only the call tells may be 0.
        return all(holds_unless_unknown(size >= 1) for size in (*site.q_shape[:2], site.k_shape[1]))


def _no_kernel_reason(site: Site, implementation: str | None = None, **variant: Any) -> str | None:
    """Return why no kernel of the site's device runs a variant of its attention, None if one does."""
    if site.device.type == "cpu":
        return None
    if site.device.type != "cuda":
        return f"no implementation for device {site.device.type}"
    from lite_attention import cute_kernels  # on first use: it may import cutlass

    head_dim, value_dim = site.q_shape[3], site.v_shape[3]
    return cute_kernels.unsupported_reason(head_dim, value_dim, site.dtype, site.device, implementation, **variant)
