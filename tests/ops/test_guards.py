"""Derivatives, `torch.func` transforms, autocast: an op is right under them, or refuses them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import lite_attention
from lite_attention.ops import SkipState
from tests.support.op_cases import clustered_qkv

Q, K, V = clustered_qkv(0, seq_q=24, seq_k=40)
MEAN = K.mean(1)

# By op: the call, its differentiable arguments.
CALLS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "skip_attention": (lambda q, k, v: _skip(q, k, v, None), (Q, K, V)),
    "skip_attention_reference": (lambda q, k, v: _skip(q, k, v, "reference"), (Q, K, V)),
    "attention": (lite_attention.attention, (Q, K, V)),
    "key_mean": (lambda k: torch.ops.lite_attention.key_mean(k, None), (K,)),
    "quantize_query": (lambda q, mean: torch.ops.lite_attention.quantize_query(q, mean, scale=None)[3], (Q, MEAN)),
    "quantize_key": (lambda k, mean: torch.ops.lite_attention.quantize_key(k, mean, None, tile_n=8)[1], (K, MEAN)),
    "quantize_value": (lambda v: torch.ops.lite_attention.quantize_value(v, None)[1], (V,)),
}
EACH_ARGUMENT = [(name, i) for name, (_, args) in CALLS.items() for i in range(len(args))]

_state = SkipState.for_inputs(Q, K, threshold=-1.0)


def _skip(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, implementation: str | None) -> Any:
    return lite_attention.skip_attention(q, k, v, _state, implementation=implementation)


def _of_argument(name: str, place: int) -> tuple[Callable[[torch.Tensor], Any], torch.Tensor]:
    """Return the call as a function of one of its arguments, and that argument."""
    call, args = CALLS[name]
    return lambda x: call(*args[:place], x, *args[place + 1 :]), args[place]


def _dual(f: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FORWARD: dict[str, Callable[..., Any]] = {
    "dual tensor": _dual,
    "dual tensor, no_grad": lambda f, x: torch.no_grad()(_dual)(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jvp of jvp": lambda f, x: torch.func.jvp(lambda y: FORWARD["jvp"](f, y)[1], (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap of jvp": lambda f, x: torch.vmap(lambda t: torch.func.jvp(f, (x,), (t,))[1])(torch.stack([x, x])),
}
REVERSE: dict[str, Callable[..., Any]] = {
    "requires_grad": lambda f, x: f(x.detach().requires_grad_()),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
}


def _assert_refused(transform: Callable[..., Any], name: str, place: int, message: str) -> None:
    before = [buffer.clone() for buffer in _state.buffers()]
    with pytest.raises(RuntimeError, match=f"lite_attention::{name} {message}"):
        transform(*_of_argument(name, place))
    assert all(torch.equal(a, b) for a, b in zip(before, _state.buffers(), strict=True))


@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize(("name", "place"), EACH_ARGUMENT)
def test_forward_mode_is_refused(name: str, place: int, transform: str) -> None:
    _assert_refused(FORWARD[transform], name, place, "has no forward-mode derivative, and .* has a tangent")


@pytest.mark.parametrize("transform", REVERSE)
@pytest.mark.parametrize(("name", "place"), EACH_ARGUMENT)
def test_reverse_mode_is_refused(name: str, place: int, transform: str) -> None:
    _assert_refused(REVERSE[transform], name, place, "has no backward, and .* requires a gradient")


def test_what_has_no_tangent_goes_through() -> None:
    """Inside of a dual level only what is differentiated is refused."""
    want = lite_attention.attention(Q, K, V)
    out, tangent = torch.func.jvp(lambda x: x * lite_attention.attention(Q, K, V), (Q,), (torch.ones_like(Q),))
    torch.testing.assert_close(out, Q * want)
    torch.testing.assert_close(tangent, want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("skip")])
def test_vmap_of_an_op_without_a_state(name: str) -> None:
    call, args = CALLS[name]
    several = [torch.stack([x, 2 * x, -x]) for x in args]
    want = torch.stack([call(*each) for each in zip(*several, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(*several), want)


@pytest.mark.parametrize(("name", "place"), [each for each in EACH_ARGUMENT if each[0].startswith("skip")])
def test_vmap_over_a_state_is_refused(name: str, place: int) -> None:
    """Its calls would share one memory."""
    vmap: Callable[..., Any] = lambda f, x: torch.vmap(f)(torch.stack([x, x]))  # noqa: E731
    _assert_refused(vmap, name, place, "cannot run under torch.vmap: calls that share a state")


@pytest.mark.parametrize("name", CALLS)
def test_autocast_stays_outside(name: str) -> None:
    """Scores and sums of float32 are not rounded to what matmuls are cast to, and votes are those of outside."""
    call, args = CALLS[name]
    _state.reset()
    want, mask = call(*args), _state.skip_mask.clone()
    _state.reset()
    with torch.autocast("cpu", torch.bfloat16):
        got = call(*args)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert torch.equal(_state.skip_mask, mask)
