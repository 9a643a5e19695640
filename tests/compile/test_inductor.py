"""The same through Inductor: what it generates, what mode= and options= tell it, freezing, and the backend's name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import lite_attention
from lite_attention.compile import LiteAttentionBackend, liteattn_backend
from lite_attention.ops.cpu import skip_attention_reference
from tests.support.toys import Attention, Reference, assert_same_states, tokens, toy_backend

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Probe:
    """An Inductor pass that notes a setting while the graph is compiled."""

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.seen: list[object] = []
        self.static_inputs: set[int] = set()
        self.inputs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(getattr(config, self.setting))
        metadata = torch._guards.TracingContext.get().fw_metadata
        self.static_inputs = set(metadata.static_input_indices)
        self.inputs = len(graph.find_nodes(op="placeholder"))


@contextmanager
def spy() -> Iterator[list[tuple[Any, ...]]]:
    """Collect the arguments that the CPU kernel gets."""
    calls: list[tuple[Any, ...]] = []

    def kernel(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args)
        return skip_attention_reference(*args, **kwargs)

    with torch.library._scoped_library("lite_attention", "IMPL") as library:
        library.impl("skip_attention", kernel, "CPU", allow_override=True)
        yield calls


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_the_kernel_gets_the_users_buffers() -> None:
    """No clone and no copy back: the generated code passes its argument on. And options= reach Inductor."""
    model, backend, probe = Attention(), toy_backend("inductor"), Probe("epilogue_fusion")
    reference = Reference(model)
    options = {"epilogue_fusion": False, "max_autotune": False, "post_grad_custom_post_pass": probe}
    compiled = torch.compile(model, backend=backend, fullgraph=True, options=options)
    counters.clear()
    with spy() as calls, torch.no_grad():
        out, (code,) = run_and_get_code(compiled, tokens(0))
        torch.testing.assert_close(out, reference(tokens(0)), **CLOSE)
        for step in range(1, 3):
            torch.testing.assert_close(compiled(tokens(step)), reference(tokens(step)), **CLOSE)
    assert_same_states(backend, model, reference)
    assert reference.skipped > 0
    assert probe.seen == [False]
    assert set(range(probe.inputs - 3, probe.inputs)) <= probe.static_inputs  # or CUDA graphs would not take it
    (state,) = backend.store.session.states
    of_compiled = [args for args in calls if args[3].data_ptr() == state.skip_mask.data_ptr()]
    assert len(of_compiled) == 3
    for args in of_compiled:
        buffers = (state.skip_mask, state.control, state.threshold)
        assert [tensor.data_ptr() for tensor in args[3:6]] == [buffer.data_ptr() for buffer in buffers]
    assert not counters["inductor"]["possibly_missed_reinplacing_bytes"]
    assert code.count("torch.ops.lite_attention.skip_attention.default(") == 1
    assert "copy_" not in code
    assert "clone" not in code


def test_dynamic_shapes() -> None:
    model, backend = Attention(), toy_backend("inductor")
    reference = Reference(model)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for step, (batch, seq) in enumerate([(2, 96), (2, 96), (3, 130), (2, 96)]):
        x = tokens(step, batch, seq)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), reference(x), **CLOSE)
    assert_same_states(backend, model, reference)
    assert reference.skipped > 0


def test_freezing() -> None:
    model, backend = nn.Sequential(Attention(), Attention()).eval(), toy_backend("inductor")
    reference = Reference(model)
    with config.patch(freezing=True), torch.no_grad():
        for layer in model:
            layer.compile(backend=backend)
        for step in range(3):
            torch.testing.assert_close(model(tokens(step)), reference(tokens(step)), **CLOSE)
    assert_same_states(backend, model, reference)
    assert reference.skipped > 0


def test_backward_does_not_run_it_again() -> None:
    """Attention without gradients before a head that is trained: the partitioner could recompute what it needs."""
    model, backend = nn.Sequential(Attention(), nn.Tanh(), nn.Linear(32, 32)), toy_backend("inductor")
    dense = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    for step in range(2):
        for each in (compiled, dense) if step == 0 else (compiled,):
            each(tokens(0)).square().sum().backward()
        if step == 0:
            torch.testing.assert_close(model[2].weight.grad, dense[2].weight.grad, **CLOSE)
        (state,) = backend.store.session.states
        assert state.step() == step + 1
    assert state.skip_mask.any()


@pytest.mark.filterwarnings("ignore:lite_attention")
def test_the_name_liteattn_and_a_mode() -> None:
    """The entry point of the installed package names the default instance."""
    (entry,) = entry_points(group="torch_dynamo_backends", name="liteattn")
    assert entry.load() is liteattn_backend is lite_attention.liteattn_backend
    assert torch._dynamo.lookup_backend("liteattn") is liteattn_backend
    assert "liteattn" in torch.compiler.list_backends()

    model, probe = Attention(), Probe("triton.cudagraphs")
    with config.patch(post_grad_custom_post_pass=probe):
        model.compile(backend="liteattn", mode="reduce-overhead")
        with torch.no_grad():
            out = model(tokens(0))
    torch.testing.assert_close(out, model.forward(tokens(0)), **CLOSE)  # nothing is skipped yet
    assert probe.seen == [True]
    (row,) = lite_attention.report(model).rows
    assert row.reason is None
    assert row.state is not None
    assert row.state.step() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"options": {"no_such_option": 1}}, "no_such_option"), ({"mode": "no-such-mode"}, "no-such-mode")],
)
def test_unknown_modes_and_options_raise(arguments: dict[str, Any], message: str) -> None:
    compiled = torch.compile(Attention(), backend=toy_backend("inductor"), **arguments)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message):
        compiled(tokens(0))


def test_another_inner_compiler_has_no_modes() -> None:
    compiled = torch.compile(Attention(), backend=LiteAttentionBackend(inner="eager"), mode="max-autotune")
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="expected none with inner='eager'"):
        compiled(tokens(0))
