"""What moving, copying and pickling a state, or a module with one, means: nothing is shared, nothing is made up."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention import LiteAttention, skip_attention
from lite_attention.ops import SkipState, default_session
from lite_attention.ops import control as c
from tests.support.op_cases import Qkv, clustered_qkv

SIZES: dict[str, Any] = {"batch": 1, "heads": 2, "seq_q": 70, "seq_k": 90, "tile_m": 16, "tile_n": 16}


def _inputs(step: int = 0) -> Qkv:
    return clustered_qkv(0, seq_q=70, seq_k=90, head_dim=16, step=step)


def _state() -> SkipState:
    """Return a state that has learned something."""
    state = SkipState(**SIZES, threshold=-1.0, initial_mask=torch.eye(5, 6, dtype=torch.bool)[None, None])
    for step in range(2):
        skip_attention(*_inputs(step), state)
    return state


def _module() -> LiteAttention:
    module = LiteAttention(threshold=-1.0).allocate(1, 70, 2, 16, kv_seq_len=90)
    for step in range(2):
        module(*_inputs(step))
    return module


def _pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def _saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved,
    "copy of a parent": lambda x: copy.deepcopy(nn.Sequential(nn.Linear(2, 2), x))[1],
}
MAKERS: dict[str, Callable[[], Any]] = {"state": _state, "module": _module}


def _call(x: Any, step: int) -> Any:
    return x(*_inputs(step)) if isinstance(x, LiteAttention) else skip_attention(*_inputs(step), x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_has_learned_the_same_and_goes_its_own_way(kind: str, how: str, inference: bool) -> None:
    original, reference = MAKERS[kind](), MAKERS[kind]()
    with torch.inference_mode(inference):
        twin = COPIES[how](original)
    before = [buffer.clone() for buffer in original.buffers()]
    assert len(before) == len([*twin.buffers()]) >= 3
    for step in range(2, 4):
        assert torch.equal(_call(twin, step), _call(reference, step))  # outside of inference mode too
    twin.set_threshold(-0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, original.buffers(), strict=True))
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(twin.buffers(), original.buffers(), strict=True))


def test_a_shallow_copy_of_a_module_has_options_and_a_state_of_its_own() -> None:
    module = _module()
    state, twin = module.state, copy.copy(module)
    twin.set_threshold(-0.5)
    twin.allocate(1, 20, 2, 16)
    assert module.state is state
    assert "threshold=-1.0" in repr(module)
    assert twin.state in default_session.states
    bare = copy.copy(LiteAttention())
    assert bare.state is None


@pytest.mark.parametrize(
    "move", [lambda x: x.to("cpu"), lambda x: x.to_empty(device="cpu"), lambda x: x.share_memory()]
)
def test_moves_within_a_device_keep_what_was_learned(move: Any) -> None:
    state, reference = _state(), _state()
    with torch.inference_mode():
        move(nn.Sequential(state))
    assert torch.equal(_call(state, 2), _call(reference, 2))


@pytest.mark.parametrize("back", [lambda x: x.to("cpu"), lambda x: x.to_empty(device="cpu")])
def test_from_the_meta_device_nothing_comes_back(back: Any) -> None:
    state = nn.Sequential(_state()).to("meta")
    with pytest.raises(RuntimeError, match="SkipState: expected data to move, but it is on the meta device"):
        back(state)
    module, fresh = _module(), LiteAttention(threshold=-1.0)
    back(nn.Sequential(module).to("meta"))
    for step in range(2, 4):
        assert torch.equal(_call(module, step), _call(fresh, step))


def test_memory_that_nobody_wrote_is_refused() -> None:
    """As offloading to disk leaves it: other memory under the same tensors."""
    state = _state()
    for buffer in state.buffers():
        buffer.data = torch.full_like(buffer, 7)
    message = "control: expected a state, got memory that nobody wrote: .*offloaded"
    for call in (lambda: _call(state, 2), state.sparsity, state.step, lambda: state.slot):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_state_of_version_0_1_runs() -> None:
    """It has no signature."""
    state, reference = _state(), _state()
    state.control[c.SIGNATURE] = 0
    assert torch.equal(_call(state, 2), _call(reference, 2))


def test_what_is_not_saved_is_a_tensor() -> None:
    """accelerate asks each buffer that is not persistent for its device."""
    state = SkipState(**SIZES)
    assert state._non_persistent_buffers_set == {name for name, _ in state.named_buffers()}


@pytest.mark.parametrize("make", [_state, _module, LiteAttention])
def test_replicas_of_data_parallel_are_refused(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), make())
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel makes replicas anew for each call"):
        [module._replicate_for_data_parallel() for module in model.modules()]  # as nn.parallel.replicate does


# ---- fake tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["a fake call", "a real call", "allocate", "allocate under the mode"])
@pytest.mark.parametrize("after", ["inside", "outside"])
def test_a_call_with_fake_tensors_leaves_nothing_behind(first: str, after: str) -> None:
    """Shapes come out right, before and after real calls, inside of the mode and after it."""
    module, reference = LiteAttention(threshold=-1.0), LiteAttention(threshold=-1.0)
    mode = FakeTensorMode()
    if first == "a real call":
        assert torch.equal(module(*_inputs()), reference(*_inputs()))
    elif first == "allocate":
        module.allocate(1, 70, 2, 16, kv_seq_len=90)
    elif first == "allocate under the mode":
        with mode:
            module.allocate(1, 70, 2, 16, kv_seq_len=90)
    fakes = [mode.from_tensor(x) for x in _inputs()]
    for _ in range(2):
        with mode if after == "inside" else torch.no_grad():
            out, lse = module(*fakes, return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((1, 70, 2, 16), (1, 2, 70))
    with FakeTensorMode():  # another one
        module(*(torch.empty(x.shape) for x in fakes))
    for step in range(1, 3):
        assert torch.equal(module(*_inputs(step)), reference(*_inputs(step)))


def test_what_is_usable_with_what() -> None:
    state, real = _state(), torch.zeros(1)
    with FakeTensorMode() as mode:
        fake, fake_state = torch.zeros(1), SkipState(**SIZES)
    lenient = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(real)
    with FakeTensorMode():
        stranger = torch.zeros(1)
    usable = {(a, b): x.is_usable_with(y) for a, x in (("real", state), ("fake", fake_state)) for b, y in (
        ("real", real), ("fake", fake), ("stranger", stranger), ("lenient", lenient), ("meta", real.to("meta"))
    )}  # fmt: skip
    assert mode is not None
    assert {pair for pair, yes in usable.items() if yes} == {("real", "real"), ("fake", "fake"), ("real", "lenient")}
