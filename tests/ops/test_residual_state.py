"""`ResidualState`: sizes, bytes, plans in place, saving, loading, moving, copying, memory that runs out."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import pickle
import re
import threading
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lite_attention
from lite_attention.ops import ResidualState, host_memory, residual_attention, step_plan
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.options import ResidualOptions
from lite_attention.ops.residual_state import RESIDUAL_BUFFERS
from tests.support.buffers import assert_buffers, buffers_of, bytes_of
from tests.support.op_cases import Qkv, clustered_qkv

SIZES = {"batch": 2, "heads": 4, "seq_q": 50, "seq_k": 70, "value_dim": 8, "tile_m": 8, "tile_n": 8}  # 7 x 9 tiles
DTYPES = ("fp8", "bf16", "fp32")


def _state(**options: Any) -> ResidualState:
    return ResidualState(**{**SIZES, "plan": [2, 1, 0], **options})


def _inputs(step: int = 0, **options: Any) -> Qkv:
    sizes = {"batch": 2, "seq_q": 50, "seq_k": 70, "heads": 4, "kv_heads": 2}
    return clustered_qkv(4, **{**sizes, **options}, step=step)


def _used(**options: Any) -> ResidualState:
    """Return a state that has been through full and sparse steps in both of its slots."""
    state = _state(**options)
    for slot in range(state.slots):
        state.slot = slot
        state.set_time(0.9 - slot / 4)
        for step in range(3 + slot):
            residual_attention(*_inputs(step), state)
    return state


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forecast", [True, False])
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_sizes_and_bytes(residual_dtype: Any, forecast: bool) -> None:
    assert lite_attention.ResidualState is ResidualState
    sizes = {**SIZES, "seq_k": 8 * 33, "slots": 3, "forecast": forecast, "residual_dtype": residual_dtype}
    state = ResidualState(**sizes, plan=step_plan(20), num_steps=50)
    planes = 2 if forecast else 1
    assert (*state._buffers,) == (*RESIDUAL_BUFFERS, "part")
    assert state.skip_mask.shape == (3, 2, 2, 4, 7, 2)
    assert state.residual.shape == (3, planes, 2, 4, 50, 8)
    assert state.row_lse.shape == (3, 1 + planes, 2, 4, 50)
    assert (state.plan.shape, state.keep.shape, state.times.shape) == ((51,), (50,), (3, 3))
    assert (state.residual_scale is not None) == (residual_dtype == "fp8")
    assert state.times.isnan().all()
    assert state.plan.tolist() == [*step_plan(20), *[0] * 31]
    assert state.kept_tiles().all()
    assert state.kept_tiles().shape == (3, 2, 4, 7, 33)
    assert "7x33 tiles of 8x8" in repr(state)
    assert f"{planes} residuals in" in repr(state)

    parts = ResidualState.nbytes_of(**sizes)
    assert parts.mask == state.skip_mask.nbytes
    assert parts.residual == state.residual.nbytes
    assert parts.scale == (0 if state.residual_scale is None else state.residual_scale.nbytes)
    assert parts.lse == state.row_lse.nbytes
    rest = state.nbytes - parts.total
    assert rest == 4 * (c.control_words(3) + 51 + 50 + 9)


def test_the_figures_of_a_large_model() -> None:
    """Wan 14B at 720p: two residuals of 75,600 x 40 x 128 bytes, a layer and branch."""
    sizes = {"batch": 1, "heads": 40, "seq_q": 75_600, "seq_k": 75_600, "value_dim": 128, "tile_m": 192, "tile_n": 80}
    parts = ResidualState.nbytes_of(**sizes, slots=1)
    assert parts.residual == 2 * 387_072_000
    assert parts.scale == 2 * 4 * 75_600 * 40
    assert ResidualState.nbytes_of(**sizes, slots=1, forecast=False).residual == 387_072_000
    assert ResidualState.nbytes_of(**sizes, slots=2).total == 2 * parts.total


def test_for_inputs_takes_the_sizes_of_the_inputs_and_of_the_table() -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=100, seq_k=70, heads=4, kv_heads=2, value_dim=16)
    state = ResidualState.for_inputs(q, k, v, plan=[2], keep=0.4, slots=3)
    assert state.capacity == (2, 4, 100, 70)
    assert (state.tile_m, state.tile_n, state.slots, state.value_dim) == (64, 64, 3, 16)
    assert torch.equal(state.keep, torch.tensor([0.4]))


def test_its_options_are_declared_once() -> None:
    import inspect

    assert {*inspect.signature(ResidualState).parameters} - {*SIZES, "device"} == {*ResidualOptions.__annotations__}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 0}, f"{name}: expected at least 1, got 0") for name in (*SIZES, "slots", "num_steps", "refresh")),
        ({"plan": [3]}, r"plan: expected integers, each 0 \(sparse\), 1 \(full\) or 2 .*, got \[3\]"),
        ({"keep": 1.5}, r"keep: expected a share from 0 to 1, or a tensor \(steps,\) of them, got 1.5"),
        ({"forecast": 1}, "forecast: expected True or False, got 1"),
        ({"residual_dtype": "int8"}, "residual_dtype: expected 'fp8' or 'bf16' or 'fp32', got 'int8'"),
        ({"residual_dtype": None}, "residual_dtype: expected 'fp8' or 'bf16' or 'fp32', got None"),
        ({"memory": "disk"}, "memory: expected 'device' or 'host', got 'disk'"),
        ({"auto_step": None}, "auto_step: expected True or False, got None"),
        ({"initial_mask": torch.zeros(1, 1, 7, 8).bool()}, r"initial_mask: expected bool \(1 or 2, 1 or 4, 7, 9\)"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _state(**options)


# ---- what a user reads and writes ----------------------------------------------------------------------------------


def test_plan_keep_and_time_are_written_in_place() -> None:
    state = _state(num_steps=5)
    addresses = [buffer.data_ptr() for buffer in state.buffers()]
    state.set_plan([2, 1])
    assert state.plan.tolist() == [2, 1, 1, 1, 1, 1]
    state.set_plan(torch.tensor([2, 0, 0, 0, 1]))
    assert state.plan.tolist() == [2, 0, 0, 0, 1, 1]
    state.set_plan([2, 0, 0, 0, 0, 1])  # what comes after the steps may be another kind
    assert state.plan.tolist() == [2, 0, 0, 0, 0, 1]
    state.set_keep(torch.tensor([0.5, 0.25]))
    assert state.keep.tolist() == [0.5, *[0.25] * 4]
    state.set_keep(0.75)
    assert state.keep.tolist() == [0.75] * 5
    state.times[:, 1:] = 3
    state.set_time(0.5)
    assert state.times.tolist() == [[0.5, 3, 3]] * 2
    state.set_time(None)
    assert state.times[:, 0].isnan().all()
    assert (state.times[:, 1:] == 3).all()
    assert [buffer.data_ptr() for buffer in state.buffers()] == addresses


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda state: state.set_plan([0] * 5), "plan: expected at most 4 steps, as many as the state was made with"),
        (lambda state: state.set_plan([5]), "plan: expected integers"),
        (lambda state: state.set_keep(torch.zeros(4)), "keep: expected at most 3 steps, .*, got 4"),
        (lambda state: state.set_keep(math.nan), "keep: expected a share from 0 to 1"),
        (lambda state: state.set_time("now"), "time: expected a finite number or None, got 'now'"),
        (lambda state: state.set_time(math.inf), "time: expected a finite number or None, got inf"),
        (lambda state: state.set_time(True), "time: expected a finite number or None, got True"),
        (lambda state: state.reset(2), "slot: expected 0 to 1, got 2"),
    ],
)
def test_values_that_are_none_change_nothing(write: Any, message: str) -> None:
    state = _used()
    before = buffers_of(state)
    with pytest.raises(ValueError, match=message):
        write(state)
    assert_buffers(state, before)


def test_reset() -> None:
    state = _used()
    before = buffers_of(state)
    state.reset(0)
    assert state.times[0].isnan().all()
    assert torch.equal(bytes_of(state.times[1]), bytes_of(before["times"][1]))
    assert state.kept_tiles()[0].all()
    assert torch.equal(state.skip_mask[1], before["skip_mask"][1])
    assert (state.step(0), state.step(1)) == (0, 4)
    state.reset()
    assert state.times.isnan().all()
    assert state.kept_tiles().all()
    state.slot = 0
    assert torch.equal(residual_attention(*_inputs(), state), residual_attention(*_inputs(), _state()))


def test_kept_tiles_are_those_of_the_mask_in_use() -> None:
    state = _state(plan=[2, 1, 2, 0], keep=torch.tensor([0.2, 0.9, 0.9, 0.9]), slots=1)
    kept = []
    for step in range(4):
        residual_attention(*_inputs(step), state)
        kept.append(float(state.kept_tiles().float().mean()))
    first = ~unpack_bits(state.skip_mask[:, 1], 9)
    assert kept[0] == 1  # decided, and not in use yet
    assert kept[1:] == [pytest.approx(0.2, abs=0.02)] * 3  # the next one waits
    assert torch.equal(state.kept_tiles(), first)
    assert float(state.sparsity()) == pytest.approx(1 - kept[3])
    assert state.sparsity(("slot", "batch", "head")).shape == (1, 2, 4)
    state.start_fresh()
    residual_attention(*_inputs(4), state)
    assert state.kept_tiles().all()  # the old mask is still there, and not in use


def test_calls_of_two_threads_at_once_are_refused() -> None:
    state = _state()
    outer = state.claim()
    errors: list[Exception] = []

    def call() -> None:
        try:
            residual_attention(*_inputs(), state)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    state.release(outer)
    assert "state: expected calls from one thread at a time" in str(errors[0])
    residual_attention(*_inputs(), state)


# ---- saving, loading, moving, copying ------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"forecast": False}, {"initial_mask": torch.ones(1, 1, 7, 9).bool()}],
    ids=["forecast", "one residual", "initial mask"],
)
def test_state_dict_round_trip(residual_dtype: str, options: dict[str, Any]) -> None:
    options = {"residual_dtype": residual_dtype, "num_steps": 9, "refresh": 7, **options}
    state = _used(**options)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)  # weights_only

    into = _state(**options)
    addresses = [buffer.data_ptr() for buffer in into.buffers()]
    into.load_state_dict(saved)
    assert [buffer.data_ptr() for buffer in into.buffers()] == addresses
    anew = ResidualState.from_state_dict(saved)
    assert anew.capacity == state.capacity
    before = buffers_of(state)
    for loaded in (into, anew):
        assert_buffers(loaded, before)
        assert torch.equal(residual_attention(*_inputs(5), loaded), residual_attention(*_inputs(5), copy.copy(state)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"slots": 3}, r"skip_mask: expected torch.int32 \(2, 2, 2, 4, 7, 1\), got torch.int32 \(3, 2, 2, 4, 7, 1\)"),
        ({"plan": [0] * 4}, r"plan: expected torch.int32 \(4,\), got torch.int32 \(5,\)"),
        ({"residual_dtype": "fp32"}, r"state_dict: expected .*'residual_scale'.* got"),
        ({"forecast": False}, r"residual: expected torch.float8_e4m3fn \(2, 2, 2, 4, 50, 8\), got"),
        ({"value_dim": 16}, r"residual: expected torch.float8_e4m3fn \(2, 2, 2, 4, 50, 8\), got"),
        ({"seq_q": 49}, r"residual: expected"),
        ({"seq_k": 69}, r"geometry .*: expected \[2, 4, 50, 70, 8, 8\], got \[2, 4, 50, 69, 8, 8\]"),
    ],
    ids=str,
)
def test_state_dicts_that_do_not_fit(other: dict[str, Any], message: str) -> None:
    state = _used()
    before = buffers_of(state)
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(_state(**other).state_dict())
    assert_buffers(state, before)


@pytest.mark.parametrize("name", [name for name in RESIDUAL_BUFFERS if name != "initial_mask"] + ["geometry"])
@pytest.mark.parametrize("wrong", [None, 3, "x", torch.zeros(1, device="meta"), torch.zeros(7)], ids=str)
def test_state_dicts_of_what_is_no_state(name: str, wrong: Any) -> None:
    state = _used()
    before, saved = buffers_of(state), {**_state().state_dict(), name: wrong}
    with pytest.raises(ValueError, match=f"({name}.*|plan): expected "):  # which has as many steps as keep
        state.load_state_dict(saved)
    with pytest.raises(ValueError, match=f"({name}.*|plan): expected "):  # which has as many steps as keep
        ResidualState.from_state_dict(saved)
    assert_buffers(state, before)


def test_a_state_over_buffers_shares_them() -> None:
    state = _used(initial_mask=torch.rand(1, 1, 7, 9) < 0.3)
    over = ResidualState.over(dict(state.named_buffers()), 8, 8)
    assert torch.equal(over.kept_tiles()[..., :9], state.kept_tiles())
    residual_attention(*_inputs(4), over)
    assert [a.data_ptr() for a in over.buffers()] == [b.data_ptr() for b in state.buffers()]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_model_saves_the_state_only_if_persistent(persistent: bool) -> None:
    model, other = (nn.Sequential(nn.Linear(2, 2), make(persistent=persistent)) for make in (_used, _state))
    saved = model.state_dict()
    names = {"0.weight", "0.bias"}
    if persistent:
        names |= {f"1.{name}" for name in (*RESIDUAL_BUFFERS, "geometry") if name != "initial_mask"}
    assert set(saved) == names
    fresh = buffers_of(other[1])
    other.load_state_dict(saved)  # strict
    assert_buffers(other[1], buffers_of(model[1]) if persistent else fresh)


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double, lambda module: module.to("cpu"), nn.Module.float])
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_casts_of_a_model_leave_the_state_as_it_is(move: Any, residual_dtype: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), _used(residual_dtype=residual_dtype))
    before = buffers_of(model[1])
    move(model)
    assert_buffers(model[1], before)
    residual_attention(*_inputs(3), model[1])


def test_moving_to_a_device_moves_all() -> None:
    state = _used().to("meta")
    assert {buffer.device.type for buffer in state.buffers()} == {"meta"}
    with pytest.raises(RuntimeError, match="ResidualState: expected data to move, but it is on the meta device"):
        state.to("cpu")


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
@pytest.mark.parametrize("options", [{}, {"memory": "host"}, {"residual_dtype": "bf16"}], ids=str)
def test_a_copy_goes_its_own_way(twin: Any, options: dict[str, Any]) -> None:
    state = _used(**options)
    before, other = buffers_of(state), twin(state)
    assert_buffers(other, before)
    residual_attention(*_inputs(4), other)
    assert_buffers(state, before)
    assert not torch.equal(other.control, state.control)


def test_a_state_made_in_inference_mode_is_written_outside_of_it() -> None:
    with torch.inference_mode():
        state = _state()
    residual_attention(*_inputs(), state)


# ---- memory --------------------------------------------------------------------------------------------------------


def test_on_the_cpu_memory_of_the_host_is_the_devices() -> None:
    host, device = _state(memory="host"), _state()
    for step in range(4):
        assert torch.equal(residual_attention(*_inputs(step), host), residual_attention(*_inputs(step), device))
    assert_buffers(host, buffers_of(device))


def test_what_lives_on_the_host_is_placed_there_and_copied_as_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU: that both, and no other, are asked for by the device that they are for."""
    placed: list[tuple[tuple[int, ...], torch.dtype]] = []

    def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        placed.append((tuple(shape), dtype))
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr(host_memory, "zeros", zeros)
    monkeypatch.setattr(ResidualState, "_is_on_host", lambda self, device: self.memory == "host")
    both = [((2, 2, 2, 4, 50, 8), torch.float8_e4m3fn), ((2, 2, 2, 4, 50), torch.float32)]
    state = _used(memory="host")
    assert placed == both
    _state()
    assert placed == both
    assert_buffers(copy.copy(state), buffers_of(state))


def test_fake_tensors_on_the_host_are_fake() -> None:
    """Where only shapes are asked for, no memory is pinned, and no GPU is needed."""
    with FakeTensorMode() as mode:
        made = host_memory.zeros((2, 3), dtype=torch.float8_e4m3fn, device=torch.device("cuda", 0))
        moved = host_memory.placed(mode.from_tensor(torch.zeros(4)), torch.device("cuda", 0))
    assert (made.shape, made.dtype, made.device.type) == ((2, 3), torch.float8_e4m3fn, "cuda")
    assert (moved.shape, moved.device.type) == ((4,), "cuda")


class _Cuda:
    """Stands for the CUDA runtime and the tensors of a GPU: what is asked of it."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.asked = error, []  # type: ignore[var-annotated]

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.asked.append(("register", address, nbytes, flags))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.asked.append(("unregister", address))
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    cuda = _Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: cuda.asked.append(("wait", device)))
    return cuda


def test_pinned_memory_lives_as_long_as_a_tensor_of_it(cuda: _Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made of the array interface on the CPU, as torch makes one on a GPU."""
    device, plain = torch.device("cuda", 0), torch.as_tensor

    def as_tensor(pinned: Any, device: torch.device) -> torch.Tensor:
        interface = pinned.__cuda_array_interface__
        holder = type("Array", (), {"__array_interface__": interface, "owner": pinned})()
        return plain(numpy.asarray(holder))

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    tensor = host_memory.zeros((2, 3, 5), dtype=torch.bfloat16, device=device)
    address = tensor.data_ptr()
    assert not tensor.any()
    assert tensor.shape == (2, 3, 5)
    view = tensor[1:]
    del tensor
    gc.collect()
    assert cuda.asked == [("register", address, 60, 0)]
    view.fill_(3)
    del view
    gc.collect()
    assert cuda.asked[1:] == [("wait", device), ("unregister", address)]
    copied = host_memory.placed(torch.arange(6.0).view(2, 3), device)
    assert torch.equal(copied, torch.arange(6.0).view(2, 3))
    del copied
    gc.collect()
    assert cuda.asked[-1][0] == "unregister"


def test_memory_that_cannot_be_pinned(cuda: _Cuda) -> None:
    cuda.error = 2
    with pytest.raises(MemoryError, match="60 bytes of the host cannot be page-locked: 2"):
        host_memory.zeros((2, 3, 5), dtype=torch.bfloat16, device=torch.device("cuda", 0))
    gc.collect()
    assert [what for what, *_ in cuda.asked] == ["register"]  # and nothing is taken back


def test_a_gpu_that_copies_is_refused(cuda: _Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "as_tensor", lambda pinned, device: pinned.memory.clone())
    with pytest.raises(RuntimeError, match="memory='host': expected a GPU that reads memory of the host in place"):
        host_memory.zeros((2, 3, 5), dtype=torch.bfloat16, device=torch.device("cuda", 0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("host")])
def test_memory_that_runs_out_is_told_with_what_would_need_less(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(ResidualState, "_zeros", fail)
    sizes = {**SIZES, "seq_q": 10**5, "residual_dtype": "bf16"}
    parts = [
        ResidualState.nbytes_of(**{**sizes, **change}).total
        for change in ({}, {"forecast": False}, {"residual_dtype": "fp8"}, {"slots": 1})
    ]
    saved = [re.escape(f"{(parts[0] - part) / 2**20:.2f} MiB") for part in parts[1:]]
    message = (
        f"ResidualState: expected {parts[0] / 2**20:.2f} MiB of memory for this site, got less: "
        f"forecast=False saves {saved[0]}; residual_dtype='fp8' saves {saved[1]}; slots=1 saves {saved[2]}; "
        'memory="host" moves .* from the GPU to the host; keep= saves time and no memory'
    )
    with pytest.raises(RuntimeError, match=message) as raised:
        ResidualState(**sizes, plan=[2])
    assert raised.value.__cause__ is error
    with pytest.raises(RuntimeError) as raised:
        ResidualState(**{**sizes, "residual_dtype": "fp8"}, slots=1, forecast=False, memory="host", plan=[2])
    assert re.search("got less: keep= saves time and no memory", str(raised.value))


def test_memory_of_the_cpu_that_runs_out() -> None:
    with pytest.raises(RuntimeError, match=r"ResidualState: expected \d+\.\d\d GiB of memory .*forecast=False saves"):
        _state(seq_q=2**31 - 1, batch=2**15)


def test_other_errors_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(ResidualState, "_zeros", fail)
    with pytest.raises(RuntimeError, match="something else"):
        _state()
