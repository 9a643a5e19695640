"""`ResidualState`: the memory of a site that keeps what skipped tiles gave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lite_attention.ops import control as c
from lite_attention.ops import host_memory
from lite_attention.ops.arguments import check_count, require
from lite_attention.ops.bitmask import WORD_BITS
from lite_attention.ops.buffers import MASKS, Sizes, nbytes_of, readable, residual_buffers
from lite_attention.ops.options import RESIDUAL_DTYPES, ResidualOptions, check_residual_options
from lite_attention.ops.plan import keep_values, plan_values
from lite_attention.ops.site_state import DEFAULT_SLOTS, SiteState
from lite_attention.ops.tiles import tile_shape

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RESIDUAL_BUFFERS", "ResidualBytes", "ResidualState"]

RESIDUAL_BUFFERS = (  # as the op takes them; the scale and the last may be None
    "skip_mask", "control", "plan", "keep", "times", "residual", "residual_scale", "row_lse", "initial_mask",
)  # fmt: skip

_ON_HOST = ("residual", "residual_scale")  # with memory="host"
_LONG_AWAY = 3  # steps; nothing is forecast over more


class ResidualBytes(NamedTuple):
    """What a `ResidualState` takes, in bytes, by part."""

    mask: int
    residual: int
    scale: int
    lse: int

    @property
    def total(self) -> int:
        """All of it, but for some hundred bytes of control words and tables."""
        return sum(self)


class ResidualState(SiteState):
    """The buffers of one attention site, as `lite_attention::residual_attention` takes them, and their meaning.

    What holds of all states is said at `SiteState`. Most of the memory are residuals, each of the size of an output:
    two for each slot, one without a forecast. `nbytes_of` says how much before anything is allocated.

    Args:
        batch: batch size, as are the others below, at most: the op may be called with less.
        heads: query heads, exactly.
        seq_q: query tokens.
        seq_k: key tokens.
        value_dim: width of a value vector, exactly.
        tile_m: query rows of a tile.
        tile_n: keys of a tile.
        slots: branches to tell apart.
        plan: the kind of each step, 0 sparse, 1 full, 2 full and deciding; past its end the last holds. `step_plan`
            makes one.
        keep: the share of tiles that a deciding step chooses, 0 to 1: a number, or a tensor (steps,), past whose end
            the last holds.
        forecast: keep two residuals, and extend the line through them to the time of a step.
        residual_dtype: what residuals are stored in, "fp8" (e4m3, a scale a row), "bf16" or "fp32".
        memory: "host": on CUDA residuals live in pinned memory of the host, which kernels read over the bus. On other
            devices it is the same as "device".
        num_steps: denoising steps of a generation: after so many calls the next one starts fresh. None = unknown.
        refresh: every so many steps starts fresh; None = only the first.
        auto_step: the op counts the steps. False: the caller writes `step`.
        initial_mask: bool tensor (batch or 1, heads or 1, q_tiles, k_tiles), True = never computed.
        persistent: save the buffers with the model that holds this module.
        device: where the buffers live.

    Raises:
        ValueError: an argument out of range, with what was expected and what came.
        RuntimeError: no memory is left, with what would need less.
    """

    BUFFERS = RESIDUAL_BUFFERS
    OPTIONAL = frozenset({"residual_scale", "initial_mask"})

    plan: torch.Tensor
    keep: torch.Tensor
    times: torch.Tensor
    residual: torch.Tensor
    residual_scale: torch.Tensor | None
    row_lse: torch.Tensor

    def __init__(
        self,
        *,
        batch: int,
        heads: int,
        seq_q: int,
        seq_k: int,
        value_dim: int,
        tile_m: int,
        tile_n: int,
        slots: int = DEFAULT_SLOTS,
        plan: Sequence[int] | torch.Tensor,
        keep: float | torch.Tensor = 0.3,
        forecast: bool = True,
        residual_dtype: Literal["fp8", "bf16", "fp32"] = "fp8",
        memory: Literal["device", "host"] = "device",
        num_steps: int | None = None,
        refresh: int | None = None,
        auto_step: bool = True,
        initial_mask: torch.Tensor | None = None,
        persistent: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            batch=batch, heads=heads, seq_q=seq_q, seq_k=seq_k, tile_m=tile_m, tile_n=tile_n, auto_step=auto_step,
            persistent=persistent,
        )  # fmt: skip
        check_residual_options(
            slots=slots, plan=plan, keep=keep, forecast=forecast, residual_dtype=residual_dtype, memory=memory,
            num_steps=num_steps, refresh=refresh, auto_step=auto_step, persistent=persistent,
        )  # fmt: skip
        self.value_dim = check_count("value_dim", value_dim)
        self.memory = memory
        self._seen: dict[int, int] = {}  # slot -> step of its last call, as far as told
        kinds, shares = plan_values(plan), keep_values(keep)
        steps = max(len(kinds), len(shares), int(num_steps or 0))
        options = {"slots": slots, "forecast": forecast, "residual_dtype": residual_dtype}
        layout = residual_buffers(
            self.sizes, slots=int(slots), steps=steps, has_initial_mask=initial_mask is not None,
            value_dim=self.value_dim, forecast=forecast, dtype=RESIDUAL_DTYPES[residual_dtype],
        )  # fmt: skip
        # A state born in inference mode could not be written outside of it.
        with torch.inference_mode(False), self._told_what_needs_less(options):
            buffers = self._new_buffers(
                layout, slots=slots, num_steps=num_steps, refresh=refresh, initial_mask=initial_mask, device=device
            )
        self._hold(buffers)
        self.times.fill_(math.nan)
        self.set_plan(kinds)
        self.set_keep(shares)

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        zeros = host_memory.zeros if name in _ON_HOST and self._is_on_host(device) else torch.zeros
        return zeros(shape, dtype=dtype, device=device)

    @classmethod
    def for_inputs(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        quantization: str = "none",
        implementation: str | None = None,
        **options: Unpack[ResidualOptions],
    ) -> ResidualState:
        """Return a state sized for q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], with the table's tiles."""
        tile_m, tile_n = tile_shape(q.shape[-1], q.dtype, q.device, quantization, implementation)
        sizes: dict[str, Any] = {
            "batch": q.shape[0], "heads": q.shape[2], "seq_q": q.shape[1], "seq_k": k.shape[1],
            "value_dim": v.shape[3], "tile_m": tile_m, "tile_n": tile_n, "device": q.device,
        }  # fmt: skip
        return cls(**{**sizes, **options})

    @classmethod
    def over(cls, buffers: Mapping[str, torch.Tensor], tile_m: int, tile_n: int) -> ResidualState:
        """Return a state that shares existing buffers, by name, such as those of an exported program."""
        slots, _, batch, heads, q_tiles, words = buffers["skip_mask"].shape
        state = cls(
            batch=batch, heads=heads, seq_q=q_tiles * tile_m, seq_k=words * WORD_BITS * tile_n,
            value_dim=buffers["residual"].shape[-1], tile_m=tile_m, tile_n=tile_n, slots=slots, plan=[0],
            device="meta",
        )  # fmt: skip
        state._buffers.update({"residual_scale": None, **buffers})
        return state

    # ---- what it takes ---------------------------------------------------------------------------------------------

    @staticmethod
    def nbytes_of(
        *,
        batch: int,
        heads: int,
        seq_q: int,
        seq_k: int,
        value_dim: int,
        tile_m: int,
        tile_n: int,
        slots: int = DEFAULT_SLOTS,
        forecast: bool = True,
        residual_dtype: Literal["fp8", "bf16", "fp32"] = "fp8",
    ) -> ResidualBytes:
        """Return the bytes of a state of this size, without making it; the arguments are those of the class."""
        check_residual_options(slots=slots, forecast=forecast, residual_dtype=residual_dtype)
        layout = residual_buffers(
            Sizes(batch, heads, seq_q, seq_k, tile_m, tile_n), slots=slots, steps=1, has_initial_mask=False,
            value_dim=value_dim, forecast=forecast, dtype=RESIDUAL_DTYPES[residual_dtype],
        )  # fmt: skip
        nbytes = nbytes_of(layout)
        return ResidualBytes(*(nbytes[name] for name in ("skip_mask", "residual", "residual_scale", "row_lse")))

    @contextmanager
    def _told_what_needs_less(self, options: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise RuntimeError(self._what_needs_less(options)) from error

    def _what_needs_less(self, options: dict[str, Any]) -> str:
        batch, heads, seq_q, seq_k = self.capacity
        sizes = {
            "batch": batch, "heads": heads, "seq_q": seq_q, "seq_k": seq_k, "value_dim": self.value_dim,
            "tile_m": self.tile_m, "tile_n": self.tile_n,
        }  # fmt: skip
        now = self.nbytes_of(**{**sizes, **options})
        changes = (("forecast", False), ("residual_dtype", "fp8"), ("slots", max(1, options["slots"] - 1)))
        advice = []
        for name, value in changes:
            if value != options[name]:
                saved = now.total - self.nbytes_of(**{**sizes, **options, name: value}).total
                advice.append(f"{name}={value!r} saves {readable(saved)}")
        if self.memory == "device":
            advice.append(f'memory="host" moves {readable(now.residual + now.scale)} from the GPU to the host')
        return (
            f"ResidualState: expected {readable(now.total)} of memory for this site, got less: "
            f"{'; '.join([*advice, 'keep= saves time and no memory'])}"
        )

    # ---- what a user reads and writes --------------------------------------------------------------------------------

    def reset(self, slot: int | None = None) -> None:
        """Forget masks, residuals, time and step of one slot, or of all (None): the next generation begins."""
        super().reset(slot)
        (self.times if slot is None else self.times[slot]).fill_(math.nan)

    def set_plan(self, plan: Sequence[int] | torch.Tensor) -> None:
        """Write the kind of each step in place: 0 sparse, 1 full, 2 full and deciding; past its end the last holds.

        It may be one longer than the steps of the state: the last is then of all that come after.

        Raises:
            ValueError: other numbers, or more steps than there is room for.
        """
        self.plan.copy_(_extended("plan", plan_values(plan), len(self.plan)))

    def set_keep(self, keep: float | torch.Tensor) -> None:
        """Write the share of tiles that deciding steps choose in place: a number, or a tensor (steps,).

        Raises:
            ValueError: no shares from 0 to 1, or more steps than there is room for.
        """
        self.keep.copy_(self.keep_table(keep))

    def keep_table(self, keep: float | torch.Tensor) -> torch.Tensor:
        """Return what `set_keep` would write, float32 (steps,), and raise what it would raise."""
        return _extended("keep", keep_values(keep), len(self.keep))

    def set_time(self, time: float | None) -> None:
        """Write the flow's time of the next calls of all slots; None = the number of the step.

        Raises:
            ValueError: no number, or not a finite one.
        """
        value = math.nan
        if time is not None:
            is_number = isinstance(time, (int, float)) and not isinstance(time, bool)
            require(is_number and math.isfinite(time), "time", "a finite number or None", repr(time))
            value = float(time)
        self.times[:, 0].fill_(value)

    def note_step(self, slot: int, step: int) -> None:
        """Note the step of the next call of a slot; one that was away for long is full: its residuals are forgotten."""
        away = step - self._seen.get(slot, step) - 1
        self._seen[slot] = step
        if away >= _LONG_AWAY:
            word = c.slot_word(slot, c.RESIDUALS)
            self.control[word : word + 1].zero_()

    def masks_in_use(self) -> torch.Tensor:
        """Return int32 [slots, B, Hq, q_tiles, k_words], 1 = skipped by a sparse step, with the mask in use."""
        taken = self.control[c.slot_word(0, 0) :].view(self.slots, c.SLOT_WORDS)[:, c.TAKEN]
        slots = torch.arange(self.slots, device=taken.device)
        in_use: torch.Tensor = self.skip_mask[slots, taken % MASKS]
        return in_use * (taken > 0).to(in_use.dtype).view(-1, 1, 1, 1, 1)

    # ---- saving, loading, moving -------------------------------------------------------------------------------------

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], *, device: Any = None, **options: Any) -> ResidualState:
        """Return a state of the geometry that was saved, holding what was saved.

        Raises:
            ValueError: a tensor is missing, unknown or not one.
        """
        geometry, residual = cls._saved_geometry(state_dict), state_dict["residual"]
        require(residual.dim() == 6, "residual", "6 dimensions", residual.dim())
        dtypes = {dtype: name for name, dtype in RESIDUAL_DTYPES.items()}
        require(residual.dtype in dtypes, "dtype of residual", str([*dtypes]), residual.dtype)
        named: dict[str, Any] = {**geometry, "residual_dtype": dtypes[residual.dtype], **options}
        state = cls(
            **named, value_dim=residual.shape[-1], slots=residual.shape[0], forecast=residual.shape[1] > 1,
            plan=state_dict["plan"][:-1], keep=state_dict["keep"], device=device,
            initial_mask=cls._saved_initial_mask(state_dict, geometry),
        )  # fmt: skip
        state.hold_place(state_dict.get("part"))
        state.load_state_dict(state_dict)
        return state

    def _is_on_host(self, device: torch.device) -> bool:
        return self.memory == "host" and device.type == "cuda"

    def _placed(self, name: str, buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
        if name in _ON_HOST and self._is_on_host(device) and buffer.device != device:
            return host_memory.placed(buffer, device)
        return super()._placed(name, buffer, device)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled: of memory on the host a copy on the CPU, which finds its place later."""
        buffers = {**self._buffers}
        for name in _ON_HOST:
            buffer = buffers[name]
            if buffer is not None:
                buffer = buffer.cpu() if self._is_on_host(buffer.device) else buffer
                # pickle does not know FP8.
                buffers[name] = buffer.view(torch.uint8) if buffer.dtype == torch.float8_e4m3fn else buffer
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was copied or pickled."""
        buffers = {**state["_buffers"]}
        if buffers["residual"].dtype == torch.uint8:
            buffers["residual"] = buffers["residual"].view(torch.float8_e4m3fn)
        super().__setstate__({**state, "_buffers": buffers})

    def extra_repr(self) -> str:
        """Return the geometry in short."""
        dtype = str(self.residual.dtype).removeprefix("torch.")
        return f"{super().extra_repr()}, {self.residual.shape[1]} residuals in {dtype} on the {self.memory}"


def _extended(name: str, values: torch.Tensor, room: int) -> torch.Tensor:
    """Return values by step for so many steps; past their end the last holds."""
    expected = f"at most {room} steps, as many as the state was made with"
    require(len(values) <= room, name, expected, len(values))
    return torch.cat([values, values[-1:].expand(room - len(values))])


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
