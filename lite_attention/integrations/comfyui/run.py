"""A sampling run: the memories of all blocks, by conditioning, and the forwards of the model that use them."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lite_attention.exact_tokens import exactly
from lite_attention.integrations.numbers import numbers_in
from lite_attention.ops import ResidualState
from lite_attention.ops.methods import METHODS
from lite_attention.ops.site import Site
from lite_attention.ops.site_state import SiteState
from lite_attention.token_layout import Ranges

from .options import NodeOptions, exact_ranges
from .schedule import Schedule

__all__ = ["FORWARD", "Forward", "Run", "attention_override"]

FORWARD = "lite_attention"  # where a `Forward` is in transformer_options

# Arguments of attention functions that change nothing here.
_KNOWN = {"scale", "enable_gqa", "transformer_options", "low_precision_attention", "_inside_attn_wrapper"}

_log = logging.getLogger("lite_attention")

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # each (batch, tokens, heads, head_dim)


class Call(NamedTuple):
    """What tells the attention calls of a forward apart."""

    block_type: Hashable
    block_index: int | None  # of those of its type; None where the model does not say
    turn: int  # of the calls with both, from 1

    @property
    def number(self) -> int:
        """The number of the block; where the model does not say, that of the call."""
        return self.turn - 1 if self.block_index is None else self.block_index


class Branch(NamedTuple):
    """What tells the passes of a step apart."""

    conditioning: Hashable
    window: tuple[int, ...] | None  # frames of a context window
    turn: int  # of the passes with both at one noise level


@dataclass
class Memory:
    """The state of one attention site in one branch, and the step that it saw last."""

    state: SiteState
    step: int


class Run:
    """One sampling run, which begins with no memory at all.

    Args:
        options: of the node.
        conditionings: that it runs in a step, as far as known.
    """

    def __init__(self, options: NodeOptions, conditionings: int = 1) -> None:
        self.options, self.conditionings = options, conditionings
        self.dense_blocks = numbers_in("dense_blocks", options.dense_blocks)
        self.memories: dict[tuple[Call, Branch, Hashable], Memory | str] = {}  # a text is why there is none
        self.reasons: Counter[str] = Counter()  # why calls were dense
        self._sigmas: torch.Tensor | None = None
        self._sigma: float | None = None
        self._turns: Counter[Hashable] = Counter()

    def forward(self, told: Mapping[str, Any], sampling: Any) -> Forward | None:
        """Return what a forward of the model needs, None where all of it is to be dense.

        Args:
            told: its `transformer_options`.
            sampling: the `model_sampling` of the model, which knows noise levels by percent.
        """
        sigmas, sigma = told.get("sample_sigmas"), told.get("sigmas")
        if sigmas is None or sigma is None or len(sigmas) < 2:
            self.say("the sampler does not tell its steps (sample_sigmas, sigmas)")
            return None
        if not self._are_sampled(sigmas):
            self._begin(sigmas, sampling)
        level = float(sigma[0])
        step = self.schedule.step(level)
        if step is None:
            self.say("outside of start_percent to end_percent")
            return None
        return Forward(self, step, level, self._branches(told, level, step), told)

    def _are_sampled(self, sigmas: torch.Tensor) -> bool:
        """Return whether these are the noise levels of this run; who wraps a sampler may hand copies on."""
        known = self._sigmas
        return known is sigmas or (known is not None and torch.equal(known.to(sigmas.device), sigmas))

    def _begin(self, sigmas: torch.Tensor, sampling: Any) -> None:
        highest, lowest = (
            float(sampling.percent_to_sigma(percent))
            for percent in (self.options.start_percent, self.options.end_percent)
        )
        self._sigmas = sigmas
        self.memories.clear()
        self.schedule = Schedule(sigmas[:-1].tolist(), highest, lowest)
        self.settings = self.options.settings(len(self.schedule.sigmas), len(self.schedule.skipping))

    def _branches(self, told: Mapping[str, Any], sigma: float, step: int) -> list[Branch]:
        """Return the branches of the batch of a forward, in its order."""
        if sigma != self._sigma:
            self._sigma = sigma
            self._turns.clear()
            self._forget_windows(step - 1)
        frames = getattr(told.get("context_window"), "index_list", None)
        window = None if frames is None else tuple(map(int, frames))
        branches = []
        kinds = told.get("cond_or_uncond") or [0]
        for conditioning in zip(kinds, told.get("uuids") or kinds, strict=True):
            self._turns[conditioning, window] += 1
            branches.append(Branch(conditioning, window, self._turns[conditioning, window]))
        return branches

    def _forget_windows(self, oldest: int) -> None:
        """Drop the memories of context windows that have moved on."""
        for key, memory in [*self.memories.items()]:
            if key[1].window is not None and isinstance(memory, Memory) and memory.step < oldest:
                del self.memories[key]

    def memory(self, call: Call, branch: Branch, qkv: Qkv) -> Memory | str:
        """Return the memory of a site, made at its first call, or a text why there can be none."""
        (q, k, v), sizes = qkv, tuple((x.shape, x.dtype, x.device) for x in qkv)
        key = (call, branch, sizes)
        if key not in self.memories:
            site = Site("attention", "ComfyUI", 0, tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, q.device)
            reason = self.settings.unsupported_reason(site)
            self.memories[key] = reason or self._new_memory(site)
        return self.memories[key]

    def _new_memory(self, site: Site) -> Memory:
        batch, seq_q, _, _ = site.q_shape
        return Memory(self.settings.new_state(site, (batch, seq_q, site.k_shape[1])), 0)

    def say(self, reason: str) -> None:
        """Note why a call is dense; log it once."""
        self.reasons[reason] += 1
        if self.options.verbose and self.reasons[reason] == 1:
            _log.info("LiteAttention: dense: %s", reason)

    def finish(self) -> None:
        """Say what the run came to."""
        states = [memory.state for memory in self.memories.values() if isinstance(memory, Memory)]
        reasons = "; ".join(f"{reason} ({count} times)" for reason, count in self.reasons.most_common())
        if states:
            mib = sum(state.nbytes for state in states) / (1 << 20)
            _log.info("LiteAttention: %d states of %.0f MiB; dense were: %s", len(states), mib, reasons or "none")
        else:
            _log.warning("LiteAttention: no attention was skipped; dense were: %s", reasons or "none was seen")


class Forward:
    """One forward of the model.

    Args:
        run: that it belongs to.
        step: of the steps that may skip.
        sigma: the noise level.
        branches: of its batch.
        told: its `transformer_options`, with the override that was there before.
    """

    def __init__(self, run: Run, step: int, sigma: float, branches: list[Branch], told: Mapping[str, Any]) -> None:
        self.run, self.step, self.sigma, self.branches = run, step, sigma, branches
        self._before = told.get("optimized_attention_override")
        self._calls: Counter[Hashable] = Counter()

    def dense(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attend as the model would without the node."""
        return func(*args, **kwargs) if self._before is None else self._before(func, *args, **kwargs)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
        attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
    ) -> torch.Tensor | None:  # fmt: skip
        """Attend, or return None where the call is to be dense; the arguments are those of ComfyUI's functions."""
        head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
        q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
        told = kwargs.get("transformer_options") or {}
        out: torch.Tensor | str | None = self._reason((q, k, v), mask, kwargs)
        if out is None:
            out = self._attend((q, k, v), self._next_call(told), told, kwargs.get("scale"))
        if isinstance(out, str):
            self.run.say(out)
            return None
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    def _reason(self, qkv: Qkv, mask: torch.Tensor | None, kwargs: Mapping[str, Any]) -> str | None:
        """Return why a call is dense whichever block it is of."""
        q, k, v = qkv
        tokens = q.shape[1]
        given = (name for name, value in kwargs.items() if value is not None and value is not False)
        unknown = [name for name in given if name not in _KNOWN]
        if k.shape[1] != tokens:
            return "cross-attention"
        if tokens < self.run.options.min_tokens:
            return f"{tokens} tokens, fewer than min_tokens {self.run.options.min_tokens}"
        if mask is not None:
            return "a mask"
        if unknown:
            return f"an argument that is not known: {', '.join(unknown)}"
        if not q.dtype == k.dtype == v.dtype:
            return f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "a gradient is required"
        return None

    def _next_call(self, told: Mapping[str, Any]) -> Call:
        """Count a call, and return what tells it from the others of the forward."""
        block = told.get("block_type"), told.get("block_index")
        self._calls[block] += 1
        return Call(*block, self._calls[block])

    def _attend(self, qkv: Qkv, call: Call, told: Mapping[str, Any], scale: float | None) -> torch.Tensor | str:
        """Attend with each conditioning of the batch apart, so that it does not matter which ones come together."""
        if call.number in self.run.dense_blocks:
            return f"block {call.number} is in dense_blocks"
        exact = tuple(exact_ranges(self.run.options.exact_tokens, told, qkv[0].shape[1]))
        branches = self.branches if qkv[0].shape[0] % len(self.branches) == 0 else [self._joined()]
        pieces = [*zip(*(x.chunk(len(branches)) for x in qkv), strict=True)]
        memories = [self.run.memory(call, *each) for each in zip(branches, pieces, strict=True)]
        outs = []
        for piece, memory in zip(pieces, memories, strict=True):
            if isinstance(memory, str):
                return memory
            outs.append(self._attend_piece(piece, memory, exact, scale))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _joined(self) -> Branch:
        """Return the branch of a call whose batch is not that of the forward."""
        first = self.branches[0]
        return Branch(tuple((branch.conditioning, branch.turn) for branch in self.branches), first.window, 1)

    def _attend_piece(self, qkv: Qkv, memory: Memory, exact: Ranges, scale: float | None) -> torch.Tensor:
        """Attend with one conditioning."""
        q, k, v = qkv
        state = memory.state
        if self.step < memory.step:
            state.start_fresh()  # a sampler that adds noise again
        memory.step = self.step
        state.set_step(self.step)
        if isinstance(state, ResidualState):
            state.set_time(self.sigma)
        method = METHODS[self.run.settings.method]
        out: torch.Tensor = exactly(state, exact, functools.partial(method.attend, q, k, v, state, scale=scale))
        return out


def attention_override(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for ComfyUI's attention in a forward that has a `Forward`."""
    forward: Forward = kwargs["transformer_options"][FORWARD]
    out = forward.attend(*args, **kwargs)
    return forward.dense(func, *args, **kwargs) if out is None else out
