"""`SiteState`: what the memories of all methods share: sizes, branches, steps, masks, saving and loading."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from lite_attention.ops import control as c
from lite_attention.ops.arguments import check_count, check_has_values, check_step
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.ops.buffers import Buffers, Sizes
from lite_attention.ops.memory import Memory
from lite_attention.ops.options import check_options
from lite_attention.ops.part import Part
from lite_attention.ops.saved_parts import masked_by_head, own_part
from lite_attention.ops.tiles import ceil_div

__all__ = ["DEFAULT_SLOTS", "SiteState"]

DEFAULT_SLOTS = 2  # cond and uncond

_AXES = ("slot", "batch", "head")


class SiteState(Memory):
    """The buffers of one attention site: masks, steps, and what a method adds to them.

    Each branch of a denoising step (cond, uncond, ...) has a slot of its own. The op updates the buffers in place and
    they are never reallocated, so their addresses may be baked into CUDA graphs and compiled code.

    The buffers stay out of the `state_dict` of a model that holds this module, unless `persistent`; `state_dict` and
    `load_state_dict` of the state itself always have them. `.to(device)` moves them and never changes a dtype.
    A copy, shallow or deep, is a state of its own that has learned the same.
    """

    BUFFERS: ClassVar[tuple[str, ...]]  # in the order of the op's arguments
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"initial_mask"})  # of them, those that may be None

    skip_mask: torch.Tensor
    control: torch.Tensor
    initial_mask: torch.Tensor | None
    part: torch.Tensor | None  # `Part.words`, where other processes have the rest
    is_dealt = False  # a module may deal it other heads
    _thread: int | None = None  # that calls the op

    def __init__(
        self, *, batch: int, heads: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int, auto_step: bool,
        persistent: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"batch": batch, "heads": heads, "seq_q": seq_q, "seq_k": seq_k, "tile_m": tile_m, "tile_n": tile_n}
        batch, heads, seq_q, seq_k, tile_m, tile_n = (check_count(name, size) for name, size in sizes.items())
        self.tile_m, self.tile_n = tile_m, tile_n
        self.persistent = persistent
        self.auto_step = auto_step
        self.capacity = (batch, heads, seq_q, seq_k)

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of q-tiles and of k-tiles."""
        return ceil_div(self.capacity[2], self.tile_m), ceil_div(self.capacity[3], self.tile_n)

    @property
    def sizes(self) -> Sizes:
        """What it has room for, and the tiles."""
        return Sizes(*self.capacity, self.tile_m, self.tile_n)

    def _new_buffers(
        self, layout: Buffers, *, slots: int, num_steps: int | None, refresh: int | None,
        initial_mask: torch.Tensor | None, device: torch.device | str | None,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        """Return buffers of a layout, filled as the state of a site that was not called yet."""
        device = torch.empty(0, device=device).device
        counts = {"num_steps": int(num_steps or 0), "refresh": int(refresh or 0)}
        # An initial mask may be one for all samples and heads.
        mask = None if initial_mask is None else self._pack_initial_mask(initial_mask).to(device)
        return {
            **{name: None if like is None else self._zeros(name, *like, device) for name, like in layout.items()},
            "control": c.new_control(int(slots), **counts, auto_step=self.auto_step, device=device),
            "initial_mask": mask,
        }

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def _hold(self, buffers: Mapping[str, torch.Tensor | None]) -> None:
        for name in self.BUFFERS:
            # accelerate takes what is not persistent for a tensor.
            self.register_buffer(name, buffers[name], persistent=self.persistent or buffers[name] is None)
        self.register_buffer("part", None)

    def _pack_initial_mask(self, mask: torch.Tensor) -> torch.Tensor:
        batch, heads = self.capacity[:2]
        check_has_values("initial_mask", mask)
        fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if mask.dtype != torch.bool or not fits or tuple(mask.shape[2:]) != self.tiles:
            q_tiles, k_tiles = self.tiles
            raise ValueError(
                f"initial_mask: expected bool (1 or {batch}, 1 or {heads}, {q_tiles}, {k_tiles}) for tiles of "
                f"{self.tile_m} x {self.tile_n}, got {mask.dtype} {tuple(mask.shape)}"
            )
        return pack_bits(mask)

    # ---- what a user reads and writes ------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Number of branches that have a memory of their own."""
        return self.skip_mask.shape[0]

    @property
    def slot(self) -> int:
        """The slot that the next call reads and writes. Reading it waits for the device."""
        return c.control_list(self.control)[c.SLOT]

    @slot.setter
    def slot(self, slot: int) -> None:
        self.control[c.SLOT : c.SLOT + 1].fill_(self._check_slot(slot))

    def _check_slot(self, slot: int) -> int:
        return check_count("slot", slot, least=0, most=self.slots - 1)

    @property
    def query_start(self) -> int | None:
        """The key at which the first query stands, where calls have a part of the queries and all keys.

        None: they have the queries of all keys, or others altogether, which spread over the keys. It decides which
        tiles are visited first. Reading it waits for the device.
        """
        start = c.control_list(self.control)[c.QUERY_START]
        return start - 1 if start > 0 else None

    @query_start.setter
    def query_start(self, start: int | None) -> None:
        word = 0 if start is None else 1 + check_count("query_start", start, least=0, most=(1 << 30) - 1)
        self.control[c.QUERY_START : c.QUERY_START + 1].fill_(word)

    @property
    def place(self) -> Part | None:
        """Which heads and queries of the whole model these are; None = all. Waits for the device."""
        words = self._buffers.get("part")  # states that 0.1 pickled have none
        return None if words is None else Part.of_words(words, self.capacity[2])

    def hold_place(self, words: torch.Tensor | None) -> None:
        """Be of this part of the whole model, `Part.words`."""
        with torch.inference_mode(False):
            own = None if words is None else words.to(self.control.device, torch.int64).clone()
        self.register_buffer("part", own, persistent=self.persistent or own is None)

    def step(self, slot: int | None = None) -> int:
        """Return the step that the next call of a slot (None = the current one) belongs to. Waits for the device."""
        words = c.control_list(self.control)
        return words[c.slot_word(words[c.SLOT] if slot is None else self._check_slot(slot), c.STEP)]

    def set_step(self, step: int, slot: int | None = None) -> None:
        """Write the step of the next call of one slot, or of all (None)."""
        step = check_step(step)
        for s in range(self.slots) if slot is None else [self._check_slot(slot)]:
            word = c.slot_word(s, c.STEP)
            self.control[word : word + 1].fill_(step)

    def start_fresh(self, slot: int | None = None) -> None:
        """Let the next call of one slot, or of all (None), start from the initial mask, without moving the step."""
        for s in range(self.slots) if slot is None else [self._check_slot(slot)]:
            word = c.slot_word(s, c.FRESH)
            self.control[word : word + 1].fill_(1)

    def pass_over(self) -> None:
        """Go on as after a call that has failed: with the next step, which starts fresh. Waits for the device."""
        call = c.read_control(self.control, self.slots, (0, 0, 0))
        self.set_step(call.next_step, call.slot)
        self.start_fresh(call.slot)

    def reset(self, slot: int | None = None) -> None:
        """Forget masks and step of one slot, or of all (None): the next generation begins."""
        for s in range(self.slots) if slot is None else [self._check_slot(slot)]:
            self.skip_mask[s].zero_()
            self.control[c.slot_word(s, 0) : c.slot_word(s + 1, 0)].zero_()

    def set_num_steps(self, num_steps: int | None) -> None:
        """Write the number of steps after which auto-step begins again at 0; None = never."""
        check_options(num_steps=num_steps)
        self.control[c.NUM_STEPS : c.NUM_STEPS + 1].fill_(num_steps or 0)

    def claim(self) -> int | None:
        """Let this thread alone call the op with this state until `release`, which is given what is returned.

        Raises:
            RuntimeError: another thread is at it.
        """
        outer, thread = self._thread, threading.get_ident()
        if outer is not None and outer != thread:
            raise RuntimeError(
                "state: expected calls from one thread at a time, got two at once; lite_attention.enable() keeps the "
                "memories of threads apart, modules by hand are one for each thread"
            )
        self.__dict__["_thread"] = thread  # an attribute of a Module costs 2 us
        return outer

    def release(self, outer: int | None) -> None:
        """Let other threads call the op again."""
        self.__dict__["_thread"] = outer

    def set_flag(self, flag: int, on: bool) -> None:
        """Set or clear `FLAG_AUTO_STEP` or `FLAG_DENSE` of the control tensor, on the device."""
        word = self.control[c.FLAGS : c.FLAGS + 1]
        word.bitwise_or_(flag) if on else word.bitwise_and_(~flag)

    def present_buffers(self) -> list[torch.Tensor]:
        """Return the buffers in the order of `BUFFERS`, without those that are None."""
        buffers = (self._buffers[name] for name in self.BUFFERS)
        return [buffer for buffer in buffers if buffer is not None]

    # ---- what it learned -------------------------------------------------------------------------------------------

    def masks_in_use(self) -> torch.Tensor:
        """Return int32 [slots, B, Hq, q_tiles, k_words], 1 = skipped by the next call, unless it starts fresh."""
        return self.skip_mask

    def kept_tiles(self) -> torch.Tensor:
        """Return bool [slots, B, Hq, q_tiles, k_tiles], True where the next call computes, unless it starts fresh.

        A fresh step starts from the initial mask instead. must_do ranges and key masks belong to a call, not to the
        state, and are not seen here.
        """
        return ~unpack_bits(self.masks_in_use(), self.tiles[1])

    def sparsity(self, per: str | Collection[str] = ()) -> torch.Tensor:
        """Return the share of tiles that the next call skips unless it starts fresh, 0 to 1, over the slots in use.

        Args:
            per: axes to keep, of "slot", "batch" and "head"; the result has them in this order. A slot not in use
                counts as 0 where the slots are kept.
        """
        skipped, tiles = self.tile_counts(per)
        return (skipped / tiles.clamp(min=1)).float()

    def tile_counts(self, per: str | Collection[str] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many tiles that is, and of how many, float64; as for `sparsity`."""
        kept_axes = {per} if isinstance(per, str) or not isinstance(per, Collection) else set(per)
        if not kept_axes <= set(_AXES):
            raise ValueError(f"per: expected names out of {_AXES}, got {[*kept_axes - set(_AXES)]}")
        skipped, total = [], []
        blocks, masks = c.control_list(self.control), self.masks_in_use()
        for slot in range(self.slots):
            batch, seq_q, seq_k = (blocks[c.slot_word(slot, f)] for f in (c.BATCH, c.SEQ_Q, c.SEQ_K))
            q_tiles, k_tiles = ceil_div(seq_q, self.tile_m), ceil_div(seq_k, self.tile_n)
            counts = torch.zeros(self.capacity[:2], dtype=torch.float64, device="cpu")
            sizes = torch.zeros_like(counts)
            if batch:
                bits = unpack_bits(masks[slot, :batch, :, :q_tiles], k_tiles)
                counts[:batch] = bits.sum((-1, -2)).to(counts)
                sizes[:batch] = q_tiles * k_tiles
            skipped.append(counts)
            total.append(sizes)
        summed = [dim for dim, axis in enumerate(_AXES) if axis not in kept_axes]
        numerator, denominator = torch.stack(skipped), torch.stack(total)
        return (numerator.sum(summed), denominator.sum(summed)) if summed else (numerator, denominator)

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the buffers and the geometry; inside a parent's `state_dict`, only if `persistent`."""
        destination = kwargs.get("destination")
        if destination is not None and not self.persistent:
            return destination
        prefix = kwargs.get("prefix", "")
        result: dict[str, torch.Tensor] = {} if destination is None else destination
        for name, buffer in self.named_buffers(recurse=False):
            result[prefix + name] = buffer if kwargs.get("keep_vars") else buffer.detach()
        result[prefix + "geometry"] = torch.tensor([*self.capacity, self.tile_m, self.tile_n], device="cpu")
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy saved buffers into this state, in place.

        A state that is of a part of a model takes what it saved itself, or its own of one of the whole model.

        Raises:
            ValueError: a tensor is missing or unknown, or was saved by a state of another geometry, or of another part;
                nothing is written.
        """
        own = self.state_dict()
        if own.keys() <= {*state_dict, "part"}:
            state_dict = masked_by_head(own_part(state_dict, self.place), own)
        if set(own) != set(state_dict):
            raise ValueError(f"state_dict: expected {sorted(own)}, got {sorted(state_dict)}")
        for name, tensor in own.items():
            saved = state_dict[name]
            check_has_values(name, saved)
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise ValueError(
                    f"{name}: expected {tensor.dtype} {tuple(tensor.shape)}, got {saved.dtype} {tuple(saved.shape)}"
                )
        if own["geometry"].tolist() != state_dict["geometry"].tolist():
            raise ValueError(
                "geometry (batch, heads, seq_q, seq_k, tile_m, tile_n): "
                f"expected {own['geometry'].tolist()}, got {state_dict['geometry'].tolist()}"
            )
        with torch.no_grad():
            for name, buffer in self.named_buffers(recurse=False):
                buffer.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])

    @classmethod
    def _saved_geometry(cls, state_dict: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that a state was saved with, as arguments.

        Raises:
            ValueError: a tensor is missing, unknown or not one.
        """
        required = {"geometry", *cls.BUFFERS} - cls.OPTIONAL
        if not required <= set(state_dict) <= required | cls.OPTIONAL | {"part"}:
            raise ValueError(f"state_dict: expected {sorted(required)}, got {sorted(state_dict)}")
        for name, saved in state_dict.items():
            check_has_values(name, saved)
        geometry = state_dict["geometry"]
        if geometry.shape != (6,):
            raise ValueError(f"geometry: expected 6 integers, got {tuple(geometry.shape)}")
        names = ("batch", "heads", "seq_q", "seq_k", "tile_m", "tile_n")
        return dict(zip(names, geometry.tolist(), strict=True))

    @staticmethod
    def _saved_initial_mask(state_dict: Mapping[str, Any], geometry: Mapping[str, int]) -> torch.Tensor | None:
        mask = state_dict.get("initial_mask")
        return None if mask is None else unpack_bits(mask, ceil_div(geometry["seq_k"], geometry["tile_n"]))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load as part of a model: only a persistent state takes part."""
        if not self.persistent:
            return
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if own:
            self.load_state_dict(own)

    def extra_repr(self) -> str:
        """Return the geometry in short."""
        batch, heads = self.capacity[:2]
        tiles = f"{self.tiles[0]}x{self.tiles[1]} tiles of {self.tile_m}x{self.tile_n}"
        return f"slots={self.slots}, batch={batch}, heads={heads}, {tiles}, {self.nbytes / (1 << 20):.2f} MiB"
