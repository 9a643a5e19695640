"""Every way to call attention gives what plain torch gives, and what torch refuses is refused, compiled or not."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

import lite_attention
from tests.support.toys import TILE, tokens

sdpa, aten, T = F.scaled_dot_product_attention, torch.ops.aten, torch.Tensor
_KEYS = (torch.arange(96) % 3 > 0).view(1, 1, 1, 96)
_NO_KEYS = torch.stack([_KEYS[0], torch.zeros(1, 1, 96, dtype=torch.bool)])

# q, k and v are (2, 4, 96, 16); with `kv` key and value heads.
SWAPPED: dict[str, tuple[int, Callable[[T, T, T], T]]] = {
    "plain": (4, lambda q, k, v: sdpa(q, k, v)),
    "by name": (4, lambda q, k, v: sdpa(value=v, query=q, key=k)),
    "all by position": (4, lambda q, k, v: sdpa(q, k, v, None, 0.0, False)),
    "scale": (4, lambda q, k, v: sdpa(q, k, v, scale=0.7)),
    "scale of 1": (4, lambda q, k, v: sdpa(q, k, v, scale=1)),
    "grouped": (2, lambda q, k, v: sdpa(q, k, v, enable_gqa=True)),
    "grouped, as many": (4, lambda q, k, v: sdpa(q, k, v, enable_gqa=True)),
    "one key head": (1, lambda q, k, v: sdpa(q, k, v, enable_gqa=True)),
    "one key head, broadcast": (1, lambda q, k, v: sdpa(q, k, v)),
    "key mask": (4, lambda q, k, v: sdpa(q, k, v, attn_mask=_KEYS)),
    "key mask that leaves none": (4, lambda q, k, v: sdpa(q, k, v, attn_mask=_NO_KEYS)),
    "other value size": (4, lambda q, k, v: sdpa(q, k, v[..., :8]).repeat(1, 1, 1, 2)),
    "op": (4, lambda q, k, v: aten.scaled_dot_product_attention(q, k, v)),
    "overload": (4, lambda q, k, v: aten.scaled_dot_product_attention.default(q, k, v, scale=0.7)),
    "in float64": (4, lambda q, k, v: sdpa(q.double(), k.double(), v.double()).float()),
}
DENSE: dict[str, tuple[int, Callable[[T, T, T], T], str]] = {
    "causal": (4, lambda q, k, v: sdpa(q, k, v, is_causal=True), "causal"),
    "causal bias": (4, lambda q, k, v: sdpa(q, k, v, attn_mask=causal_lower_right(96, 96)), ""),
    "mask and causal": (4, lambda q, k, v: sdpa(q, k, v, attn_mask=_KEYS, is_causal=True), "causal"),
    "zero float mask": (4, lambda q, k, v: sdpa(q, k, v, attn_mask=torch.zeros(1, 96)), "torch.float32 mask"),
    "mask of keys, rank 2": (4, lambda q, k, v: sdpa(q, k, v, attn_mask=_KEYS[0, 0]), "bool mask"),
    "mask per query": (4, lambda q, k, v: sdpa(q, k, v, attn_mask=_KEYS.mT | _KEYS), "bool mask that differs"),
    "scale of 0": (4, lambda q, k, v: sdpa(q, k, v, scale=0.0), "scale is not a number above 0"),
    "negative scale": (4, lambda q, k, v: sdpa(q, k, v, scale=-0.2), "scale is not a number above 0"),
    "no queries": (4, lambda q, k, v: F.pad(sdpa(q[:, :, :0], k, v), (0, 0, 0, 96)), "no queries or keys"),
    "kernel of torch": (
        4,
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
        "another attention backend: torch's _scaled_dot_product_flash_attention_for_cpu",
    ),
}
REFUSED: dict[str, tuple[int, Callable[[T, T, T], T]]] = {
    "heads that differ": (2, lambda q, k, v: sdpa(q, k, v)),
    "groups that do not divide": (3, lambda q, k, v: sdpa(q, k, v, enable_gqa=True)),
    "dtypes that differ": (4, lambda q, k, v: sdpa(q, k.bfloat16(), v)),
    "head dims that differ": (4, lambda q, k, v: sdpa(q, k[..., :8], v)),
}


class Calls(nn.Module):
    """Self-attention whose call may be any."""

    def __init__(self, kv_heads: int, call: Callable[[T, T, T], T]) -> None:
        super().__init__()
        self.qkv, self.kv_heads, self.call = nn.Linear(32, 16 * (4 + 2 * kv_heads)), kv_heads, call
        self.requires_grad_(False)

    def forward(self, x: T) -> T:
        heads = self.qkv(x).unflatten(-1, (-1, 16)).transpose(1, 2)
        return self.call(*heads.split([4, self.kv_heads, self.kv_heads], dim=1))


def _enabled(model: nn.Module, how: bool, **settings: Any) -> nn.Module:
    inner = {"inner": "eager"} if how else {}
    return lite_attention.enable(
        model, compile=how, threshold=-math.inf, tile_shape=TILE, num_steps=4, **inner, **settings
    )


def _reasons(model: nn.Module) -> list[str | None]:
    return [row.reason for row in lite_attention.report(model, file=io.StringIO()).rows]


HOW = pytest.mark.parametrize("how", [True, False])
X = tokens(0, batch=2)


@HOW
@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_calls(name: str, how: bool) -> None:
    model = Calls(*SWAPPED[name])
    dense = model(X)
    out = _enabled(model, how)(X)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    assert _reasons(model) == [None]


@HOW
@pytest.mark.filterwarnings("ignore:lite_attention")
@pytest.mark.parametrize("selected", [None, True])
@pytest.mark.parametrize("name", DENSE)
def test_dense_calls(name: str, selected: bool | None, how: bool) -> None:
    kv_heads, call, reason = DENSE[name]
    model = Calls(kv_heads, call)
    dense = model(X)
    out = _enabled(model, how, select=lambda site: selected)(X)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    (found,) = _reasons(model)
    assert found is not None
    assert found.startswith(reason)


@HOW
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name: str, how: bool) -> None:
    model = Calls(*REFUSED[name])
    with pytest.raises(RuntimeError):
        model(X)
    with pytest.raises((RuntimeError, ValueError)):  # what the op refuses is a ValueError that names the argument
        _enabled(model, how, select=lambda site: True)(X)


class Wrapper(torch.Tensor):
    """Stands for another tensor; each op needs a rule, and ours has none."""

    @staticmethod
    def __new__(cls, inner: T) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: T) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, T], *_: Any) -> Wrapper:
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "lite_attention" in str(func):
            raise NotImplementedError(f"no rule for {func}")
        plain = [a.inner if isinstance(a, Wrapper) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_tensors_that_stand_for_others_are_left_alone() -> None:
    model = Calls(4, lambda q, k, v: sdpa(Wrapper(q), Wrapper(k), Wrapper(v)))
    dense = model(X)
    with pytest.warns(UserWarning, match="a Wrapper with layout"):
        torch.testing.assert_close(_enabled(model, False, select=lambda site: True)(X), dense)
