"""One forward of a diffusers video transformer, compiled, by what computes its self-attention."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import lite_attention
from benchmarks.attention import runs_of_tiles
from lite_attention.cli.timing import Call
from lite_attention.inspection import named_states
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.plan import DECIDING, FULL

DEVICE = "cuda"
WAN = {"1.3B": (12, 8960), "14B": (40, 13824)}  # heads of 128, width of the feed-forward
LAYERS = {"1.3B": 2, "14B": 2, "LTX": 4}  # enough that the rest of a step is small beside them
# Frames, height and width of the latent. Wan: 81 frames, 480p and 720p, of which 1x2x2 make a token; LTX-Video: 121
# frames of 768x512 and 257 of 1216x704.
LATENTS = {
    "Wan": {"short": (21, 60, 104), "long": (21, 90, 160)},
    "LTX": {"short": (16, 16, 24), "long": (33, 22, 38)},
}
_ROOM = 10_000  # calls until a generation would end, and begin with steps of another kind

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (B, S, H, D)
SDPA: Callable[..., torch.Tensor] = functional.scaled_dot_product_attention


@torch.library.custom_op("lite_attention_benchmarks::fa3", mutates_args=())
def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    attended: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return attended


@torch.library.custom_op("lite_attention_benchmarks::no_attention", mutates_args=())
def no_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Copy v, so that q and k are still computed: returned as it is, v would let the compiler drop them."""
    return v.clone(memory_format=torch.contiguous_format)


@fa3.register_fake
@no_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


def build(name: str, layers: int) -> nn.Module:
    with torch.device(DEVICE):
        if name == "LTX":
            model: Any = LTXVideoTransformer3DModel(num_layers=layers)
        else:
            heads, ffn_dim = WAN[name]
            model = WanTransformer3DModel(
                num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn_dim, num_layers=layers, in_channels=16,
                out_channels=16, text_dim=4096,
            )  # fmt: skip
    ready: nn.Module = model.to(torch.bfloat16).eval().requires_grad_(False)
    return ready


def inputs_of(name: str, size: str) -> tuple[dict[str, Any], int]:
    """Return the arguments of a forward, and the number of tokens."""
    frames, height, width = LATENTS["LTX" if name == "LTX" else "Wan"][size]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    timestep = torch.tensor([500.0], device=DEVICE)
    if name != "LTX":
        latent, text = noise(1, 16, frames, height, width), noise(1, 512, 4096)
        tokens = frames * height * width // 4
        return {"hidden_states": latent, "timestep": timestep, "encoder_hidden_states": text}, tokens
    tokens = frames * height * width
    return {
        "hidden_states": noise(1, tokens, 128), "timestep": timestep, "encoder_hidden_states": noise(1, 128, 4096),
        "encoder_attention_mask": torch.ones(1, 128, device=DEVICE), "num_frames": frames, "height": height,
        "width": width,
    }, tokens  # fmt: skip


def instead_of_sdpa(attend: Attend) -> Callable[..., torch.Tensor]:
    """Return what takes the place of PyTorch's attention where queries and keys are alike and nothing is masked."""

    def function(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        if attn_mask is not None or query.shape != key.shape:
            return SDPA(query, key, value, attn_mask=attn_mask, **rest)
        out = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return out.transpose(1, 2)

    return function


@contextlib.contextmanager
def sdpa_is(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let diffusers' native attention backend find a function in the place of scaled_dot_product_attention."""
    functional.scaled_dot_product_attention = function
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = SDPA


class Variants:
    """Compiled forms of one model that share its weights; a call puts its own in place first."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model = model
        self.inputs = inputs

    @torch.inference_mode()
    def step(self) -> Any:
        return self.model(**self.inputs, return_dict=False)

    def compiled(self, attend: Attend | None = None, backends: SDPBackend | None = None) -> Call:
        """Return a step, compiled by inductor.

        Args:
            attend: what self-attention calls; None = PyTorch's.
            backends: what PyTorch's attention may use; None = all.
        """
        from torch._inductor.compile_fx import compile_fx

        def inductor(gm: Any, example_inputs: Any) -> Any:  # a function of its own: dynamo shares code by backend
            return compile_fx(gm, example_inputs)

        function = SDPA if attend is None else instead_of_sdpa(attend)
        self.model._compiled_call_impl = None
        self.model.compile(backend=inductor)
        implementation = self.model._compiled_call_impl

        def call() -> Any:
            self.model._compiled_call_impl = implementation
            chosen = contextlib.nullcontext() if backends is None else sdpa_kernel(backends)
            with sdpa_is(function), chosen:
                return self.step()

        return call

    def ours(self) -> Call:
        """Return a step with our backend; `plant` says what is skipped."""
        self.model._compiled_call_impl = None
        # Initial masks without a tile in them, so that all sparsities run the same compiled code.
        lite_attention.enable(self.model, threshold=-math.inf, num_steps=_ROOM, slots=1, initial_mask=lambda site: None)
        return self._enabled()

    def _enabled(self) -> Call:
        """Return a step of the enabled model, which is told its number: its inputs stay as they are."""
        implementation, steps = self.model._compiled_call_impl, itertools.count()

        def call() -> Any:
            self.model._compiled_call_impl = implementation
            with lite_attention.branch("only", next(steps), model=self.model):
                return self.step()

        return call

    def plant(self, call: Call, share: float) -> float:
        """Write an initial mask into all states of `ours`, and return the share of tiles skipped from then on."""
        call()
        states = list(named_states(self.model).values())
        lite_attention.reset(self.model)
        for state in states:
            assert state.initial_mask is not None
            shares = torch.full((state.capacity[1], 1), share)
            state.initial_mask.copy_(pack_bits(runs_of_tiles(shares, *state.tiles)))
        call()
        return float(states[0].sparsity())

    def residual(self) -> Call:
        """Return a step with our backend and the residual; `become` says of which kind."""
        self.model._compiled_call_impl = None
        lite_attention.enable(self.model, method="residual", num_steps=_ROOM, slots=1)
        return self._enabled()

    def become(self, call: Call, kind: int, keep: float) -> float:
        """Let all further steps of `residual` be of a kind, and return the share of tiles that sparse ones skip."""
        call()  # a state is born in its first call
        states: list[Any] = list(named_states(self.model).values())
        for now in (DECIDING, FULL, FULL, kind):  # a mask of this size, and two residuals of it
            for state in states:
                state.set_keep(keep)
                state.set_plan([now])
            call()
        return float(torch.stack([state.sparsity() for state in states]).mean())
