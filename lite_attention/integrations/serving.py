"""`ServedAttention`: the attention layers of a server, with memories by layer, shape, branch and thread.

A host calls a layer's attention, but no model that `enable` has seen. So it says where its forwards are, and asks for
each call whether LiteAttention is to run it.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lite_attention.compile.store import StateStore
from lite_attention.exact_tokens import exactly
from lite_attention.integrations.serving_options import ServingOptions, layer_index
from lite_attention.ops import Session
from lite_attention.ops.clock import Clock
from lite_attention.ops.methods import METHODS
from lite_attention.ops.site import Site
from lite_attention.ops.threads import PerThread
from lite_attention.ops.tiles import ceil_div
from lite_attention.presets import preset_of

__all__ = ["Layer", "Moment", "ServedAttention"]


class Moment(NamedTuple):
    """What a host says of a forward that begins."""

    branch: str | None = None  # None = it does not say
    step: int | None = None
    timestep: float | None = None
    begins: bool = False  # a generation begins with it
    num_steps: int | None = None  # of the generation
    time: float | None = None  # of the flow, in any unit; None = the timestep


@dataclass(eq=False)
class Layer:
    """An attention layer of a host. It owns its memories, which go with it."""

    name: str
    scale: float | None

    def __post_init__(self) -> None:
        self.index = layer_index(self.name)
        self.is_of_audio = re.search(r"(?:^|[._])audio", self.name) is not None  # as LTX-2 has beside those of video


@dataclass
class _Here:
    """Where a thread is."""

    skips: bool = False  # in a forward that may skip
    step: float | None = None  # or timestep
    ran: Counter[str | None] = field(default_factory=Counter)  # branches, in this step


class ServedAttention:
    """Runs attention for a host, where there is something to skip.

    Args:
        options: of all its layers.
    """

    def __init__(self, options: ServingOptions) -> None:
        self.options, settings = options, options.settings
        self.store = StateStore(settings, PerThread(lambda: Session(settings.slots)))
        self._clock = PerThread(lambda: Clock(settings.num_steps, settings.max_steps))
        self._here = PerThread(_Here)

    def begin_forward(self, moment: Moment) -> None:
        """Note that a forward begins in this thread; all its calls until the next one are its own."""
        session, clock, here = self.store.session, self._clock(), self._here()
        self.store.begin_forward()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            session.let_the_op_count()  # a replay runs nothing of this
            here.skips = True
            return
        if moment.begins:
            clock.begin()
        place = clock.place(self._branch(here, moment), moment.step, moment.timestep)
        if place.generation != session.generation:
            self.store.forget_other_sizes()
            self._plan(moment.num_steps)
        # Nobody says where a forward ends. It need not be left, since the next one writes its own step.
        here.skips = session.enter(place._replace(times=_times(moment)))
        if not here.skips:
            slots = self.options.settings.slots
            self.store.say(f"a step has more than {slots} passes: the others are dense; configure slots={slots + 1}")
        here.skips = here.skips and place.step >= self.options.dense_steps

    def leave(self) -> None:
        """Note that this thread runs no forward of a model that skips; its calls are dense."""
        self._here().skips = False

    @staticmethod
    def _branch(here: _Here, moment: Moment) -> str | None:
        """Return the name of a pass; in a step, or timestep, that is told, a name that ran before is another pass."""
        step = moment.timestep if moment.step is None else moment.step
        if step is None or moment.branch is None:
            return moment.branch
        if moment.begins or step != here.step:
            here.step, here.ran = step, Counter()
        here.ran[moment.branch] += 1
        number = here.ran[moment.branch]
        return moment.branch if number == 1 else f"{moment.branch} {number}"

    def _plan(self, num_steps: int | None) -> None:
        """Let a preset, some of which depend on the number of steps, be what it is for this generation."""
        if self.options.preset is not None and num_steps:
            self.store.plan(*preset_of(self.options.preset, num_steps))

    def attend(
        self,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
        picture: tuple[int, int] | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attend with a memory, or return None: then the call is one for dense attention.

        Args:
            layer: whose call it is; one that a forward calls several times has a memory for each of these calls.
            q: (batch, seq_q, heads, head_dim).
            k: (batch, seq_k, kv_heads, head_dim).
            v: (batch, seq_k, kv_heads, value_dim).
            key_mask: bool (batch or 1, seq_k), True = the key takes part.
            picture: (start, end) of the tokens that are not of text, audio or references; None = it is not told.
            return_lse: also return the log-sum-exp.

        Returns:
            out (batch, seq_q, heads, value_dim), and with `return_lse` lse float32 (batch, heads, seq_q), natural log;
            or None.
        """
        is_exact = layer.is_of_audio and self.options.exact_tokens == "auto"
        if not self._here().skips or is_exact or layer.index in self.options.dense_layers:
            return None
        if return_lse and self.options.exact_tokens not in ("auto", ()):
            self.store.say("parts of a sequence do not tell which tokens they are of: exact_tokens does not hold there")
        site = Site(layer.name, "Attention", 0, q.shape, k.shape, v.shape, q.dtype, q.device, is_self_attention=True)
        reason = self._reason(site, return_lse)
        if reason is not None:
            self.store.say(f"{layer.name} runs dense: {reason}", cause=reason)
        if reason is not None or self._is_short(site):
            return None
        (number,) = self.store.calls_before(Counter({(id(layer),): 1}))
        record = self.store.record([layer], (number,), site)
        state = self.store.state(record, (q.shape[0], q.shape[1], k.shape[1]), q.device)
        self.store.note(record, state)
        settings = self.store.settings
        attend = functools.partial(
            METHODS[settings.method].attend, q, k, v, state, scale=layer.scale, return_lse=return_lse,
            key_mask=key_mask, quantization=settings.quantization, implementation=settings.implementation,
        )  # fmt: skip
        return exactly(state, () if return_lse else self.options.exact_ranges(k.shape[1], picture), attend)

    def _reason(self, site: Site, is_part: bool) -> str | None:
        """Return why a call cannot skip, None if it can; where it is a part of one, it has other keys than queries."""
        settings = self.store.settings
        if not is_part and site.q_shape[1] != site.k_shape[1]:
            return "queries and keys of different number"
        return settings.unsupported_reason(site)

    def _is_short(self, site: Site) -> bool:
        """Return whether a sequence is too short to skip, as text and padding are: nothing that need be said."""
        settings = self.store.settings
        return ceil_div(site.k_shape[1], settings.tile_shape_for(site)[1]) < settings.min_tiles


def _times(moment: Moment) -> dict[str, float]:
    time = moment.timestep if moment.time is None else moment.time
    return {} if time is None or not math.isfinite(time) else {"timestep": time}
