"""Exported programs that carry their skip states: run, decomposed, saved, loaded, and compiled ahead of time."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import OutputKind

import lite_attention
from lite_attention.compile import Site, SkipAwareProgram, make_skip_aware, skip_states
from lite_attention.ops import ResidualState, SkipState
from lite_attention.ops.methods import METHODS
from tests.support.diffusers_models import WAN_OF_ONE_LAYER
from tests.support.toys import ENOUGH, OPTIONS, THRESHOLD, TILE, Attention, Reference, Toy, context, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STATE = ("skip_mask", "control", "threshold")
METHOD = pytest.mark.parametrize("method", OPTIONS)


def skip_aware(model: nn.Module, *args: torch.Tensor, dynamic_shapes: Any = None, **settings: Any) -> SkipAwareProgram:
    program = export(model, args or (tokens(0), context()), dynamic_shapes=dynamic_shapes)
    of_method = OPTIONS[settings.get("method", "votes")]
    return make_skip_aware(program, **{**of_method, "tile_shape": TILE, **settings})


def assert_runs(
    run: Callable[..., torch.Tensor], reference: Reference, *more: torch.Tensor, batch: int = 1, seq: int = 96
) -> None:
    """Run a fresh program and a fresh reference for some steps."""
    reference.reset()
    for step in range(ENOUGH[reference.method]):
        x = tokens(step, batch, seq)
        with torch.no_grad():
            torch.testing.assert_close(run(x, *more), reference(x, *more), **CLOSE)
    assert reference.skipped > 0


def assert_same_states(module: nn.Module, reference: Reference, slot: int = 0, branch: str = "") -> None:
    states = skip_states(module)
    assert states.keys() == {f"{path}.lite_attention" for path, *_ in reference.states}
    for (path, at, *_), expected in reference.states.items():
        if at == branch:
            kept = states[f"{path}.lite_attention"].kept_tiles()[slot]
            want = expected.kept_tiles()[0]
            assert torch.equal(kept[: want.shape[0], :, : want.shape[2], : want.shape[3]], want)


# ---- the pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_the_original_is_left_as_it_is(strict: bool) -> None:
    model = Toy(2)
    original = export(model, (tokens(0), context()), strict=strict)
    text, keys, constants = str(original), list(original.state_dict), dict(original.constants)
    program = make_skip_aware(original, threshold=THRESHOLD, tile_shape=TILE)
    assert_runs(program.module(), Reference(model), context())
    assert str(original) == text
    assert (list(original.state_dict), original.constants) == (keys, constants)
    assert list(program.state_dict) == keys == list(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(original.module()(tokens(0), context()), model(tokens(0), context()))
    assert [(site.name, site.reason) for site in program.sites] == [
        (f"blocks.{i}.{name}", reason)
        for i in range(2)
        for name, reason in (("attn1", None), ("attn2", "cross-attention"))
    ]


@METHOD
def test_states_are_non_persistent_buffers(method: str) -> None:
    program = skip_aware(Toy(1), method=method)
    absent = {"initial_mask", "residual_scale"}  # residuals in bf16 have no scale
    kinds = [name for name in METHODS[method].state.BUFFERS if name not in absent]
    names = [f"blocks.0.attn1.lite_attention.{name}" for name in kinds]
    assert program.graph_signature.buffers == tuple(names) == program.graph_signature.non_persistent_buffers
    assert not set(names) & set(program.state_dict)
    decomposed = program.run_decompositions({})
    mutated = {s.target for s in decomposed.graph_signature.output_specs if s.kind is OutputKind.BUFFER_MUTATION}
    assert mutated == set(names)


def test_a_decomposed_program_is_refused() -> None:
    program = export(Toy(1), (tokens(0), context())).run_decompositions({})
    with pytest.raises(ValueError, match="call make_skip_aware before run_decompositions"):
        make_skip_aware(program)


@pytest.mark.parametrize("kind", ["autocast", "no_grad"])
def test_regions_are_left_alone_with_a_reason(kind: str) -> None:
    class Region(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else torch.no_grad():
                return super().forward(x)

    model = Region()
    original = export(model, (tokens(0),))
    with pytest.warns(UserWarning, match="make_skip_aware: no attention was swapped \\(inside a nested region"):
        program = make_skip_aware(original)
    assert len(program.sites) == 1
    torch.testing.assert_close(program.module()(tokens(0)), model(tokens(0)))


def test_gradients_are_refused_at_the_call() -> None:
    module = skip_aware(Toy(1).requires_grad_(True)).module()
    with pytest.raises(RuntimeError, match="no backward"):
        module(tokens(0), context())


class Odd(nn.Module):
    """Names that graphs dislike, a constant, a module that attends twice, and attention as the output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.register_buffer("threshold", torch.full((32,), 0.5))
        self.last = Attention()
        self.last.to_out = nn.Identity()

    def forward(self, input: torch.Tensor, *, sum: torch.Tensor) -> torch.Tensor:
        x = self.attention(input) + self.attention(input.flip(1)) + sum * self.threshold + torch.tensor([1.0])
        q, k, v = self.last.project(x, None)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_odd_programs(tmp_path: Path) -> None:
    model, x, shift = Odd(), tokens(0), torch.ones(32)
    program = make_skip_aware(export(model, (x,), {"sum": shift}), tile_shape=TILE, threshold=-torch.inf)
    torch.export.save(program, tmp_path / "odd.pt2")
    loaded = torch.export.load(tmp_path / "odd.pt2")
    for each in (program, program.run_decompositions({}), loaded):
        module = each.module()
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(module(x, sum=shift), model(x, sum=shift), rtol=1e-5, atol=1e-5)
        assert sorted(skip_states(module)) == [
            "attention.lite_attention", "attention.lite_attention_", "lite_attention",
        ]  # fmt: skip
        assert all(state.step() == 2 for state in skip_states(module).values())


def test_settings() -> None:
    table = torch.tensor([[[-4.0, -2.0]], [[-1.0, -1.0]]])
    program = skip_aware(
        Toy(2), threshold=table, num_steps=2, select=lambda site: site.name == "blocks.1.attn1",
        initial_mask=lambda site: torch.eye(6, dtype=torch.bool)[None, None],
    )  # fmt: skip
    module = program.module()
    ((name, state),) = skip_states(module).items()
    assert name == "blocks.1.attn1.lite_attention"
    torch.testing.assert_close(state.threshold, table.expand(2, 2, 2))
    with torch.no_grad():
        module(tokens(0), context())
    assert state.step() == 1
    assert not state.kept_tiles()[0, 0, :, range(6), range(6)].any()
    assert state.kept_tiles()[0, 0, :, 0, 1:6].any()
    with torch.no_grad():
        module(tokens(0), context())
    assert state.step() == 0


def test_key_padding_mask() -> None:
    class Masked(Attention):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x, attn_mask=mask)

    model, mask = Masked(), (torch.arange(96) < 70).expand(1, 1, 1, 96)
    assert_runs(skip_aware(model, tokens(0), mask).module(), Reference(model), mask)


# ---- run, save, load -----------------------------------------------------------------------------------------------


@METHOD
@pytest.mark.parametrize("decomposed", [False, True])
def test_save_and_load(decomposed: bool, method: str, tmp_path: Path) -> None:
    model = Toy(2)
    program: ExportedProgram = skip_aware(model, method=method)
    if decomposed:
        program = program.run_decompositions({})
    reference, module = Reference(model, method=method), program.module()
    assert_runs(module, reference, context())
    assert_same_states(module, reference)
    # The program has run; what is saved is clean all the same.
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for state in skip_states(loaded).values():
        assert not state.skip_mask.any()
        assert state.step() == 0
    assert_runs(loaded, reference, context())
    assert_same_states(loaded, reference)
    assert_runs(program.module(), reference, context())  # and a second module begins fresh, too


def test_times_from_outside() -> None:
    """A program forecasts by the time that its states are told."""
    model = Toy(2)
    module = skip_aware(model, method="residual").module()
    told, flat = (copy.deepcopy(module) for _ in range(2))
    line = [1.0, 0.95, 0.9, 0.7, 0.4, 0.1]
    outs = []
    for program, times in ((module, [None] * 6), (told, line), (flat, [1.0] * 6)):
        states, out = skip_states(program), tokens(0)
        for step, time in enumerate(times):
            for state in states.values():
                assert isinstance(state, ResidualState)
                state.set_time(time)
            with torch.no_grad():
                out = program(tokens(step), context())
        outs.append(out)
    assert all((outs[a] - outs[b]).abs().max() > 1e-3 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_slots_and_thresholds_from_outside() -> None:
    model = Toy(2)
    module, reference = skip_aware(model, slots=3).module(), Reference(model)
    states = skip_states(module)
    for step in range(3):
        for slot, name in enumerate(("cond", "uncond", "perturbed")):
            for state in states.values():
                state.slot = slot
            x = tokens(step, seed=slot)
            with torch.no_grad():
                torch.testing.assert_close(module(x, context()), reference(x, context(), branch=name), **CLOSE)
    for slot, name in enumerate(("cond", "uncond", "perturbed")):
        assert_same_states(module, reference, slot, name)
    for state in states.values():
        state.reset()
        state.set_threshold(-1.0)
    again = Reference(model, threshold=-1.0)
    assert_runs(module, again, context())
    assert_same_states(module, again, slot=2)


@METHOD
def test_compiled_again(method: str) -> None:
    model = Toy(1)
    module, reference = skip_aware(model, method=method).module(), Reference(model, method=method)
    assert_runs(torch.compile(module, backend="aot_eager", fullgraph=True), reference, context())
    assert_same_states(module, reference)


@METHOD
@pytest.mark.parametrize("decomposed", [False, True])
def test_dynamic_shapes_have_a_state_of_the_largest_size(decomposed: bool, method: str) -> None:
    model = Toy(1)
    batch, seq = Dim("batch", min=1, max=4), Dim("seq", min=2, max=256)
    shapes = {"x": {0: batch, 1: seq}, "context": {0: batch}}
    program: ExportedProgram = skip_aware(model, tokens(0, 2), context(2), dynamic_shapes=shapes, method=method)
    if decomposed:
        program = program.run_decompositions({})
    module, reference = program.module(), Reference(model, method=method)
    (state,) = skip_states(module).values()
    assert state.skip_mask.shape[-4:] == (4, 2, 16, 1)
    for b, s in [(2, 96), (1, 96), (4, 200), (3, 96)]:
        if method == "residual":
            state.set_step(0)  # votes start fresh with another size; here the plan begins anew, too
        assert_runs(module, reference, context(b), batch=b, seq=s)
        assert_same_states(module, reference)


def test_an_unbounded_size_asks_for_a_bound() -> None:
    with pytest.raises(ValueError, match=r"a bound for seq_q of blocks.0.attn1 .* torch.export.Dim\(name, max=...\)"):
        skip_aware(Toy(1), dynamic_shapes={"x": {1: Dim("seq")}, "context": None})


@pytest.mark.parametrize("dense", ["sdpa", "kernel"])
def test_dense_sites_of_dynamic_shapes(dense: str) -> None:
    """Cross-attention, and self-attention that is not selected, of lengths that vary each for itself."""
    model = Toy(1)
    shapes = {"x": {0: (batch := Dim("batch", min=1, max=4)), 1: Dim("seq")}, "context": {0: batch, 1: Dim("words")}}
    with pytest.warns(UserWarning, match="not selected"):
        program = skip_aware(
            model, tokens(0, 2), context(2), dynamic_shapes=shapes, dense=dense, select=lambda site: False
        )
    assert [site.dense_kernel for site in program.sites] == [dense == "kernel"] * 2
    for b, s, words in [(2, 96, 24), (1, 5, 96), (4, 130, 130), (3, 2, 7)]:
        x, c = tokens(0, b, s), context(b, words)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x, c), model(x, c), **CLOSE)


def test_an_initial_mask_for_a_length_that_varies_is_refused() -> None:
    def mask(site: Site) -> torch.Tensor:
        tiles = site.q_shape[1] // 16
        return ~torch.eye(tiles, dtype=torch.bool)[None, None]

    seq, batch = Dim("seq", min=2, max=192), Dim("batch", min=1, max=4)
    with pytest.raises(ValueError, match=r"initial_mask: expected none, got one for blocks\.0\.attn1, whose"):
        skip_aware(Toy(1), dynamic_shapes={"x": {1: seq}, "context": None}, initial_mask=mask)
    model = Toy(1)
    shapes = {"x": {0: batch}, "context": {0: batch}}
    program = skip_aware(model, tokens(0, 2), context(2), dynamic_shapes=shapes, initial_mask=mask)
    static = skip_aware(model, tokens(0, 3), context(3), initial_mask=mask)
    with torch.no_grad():
        got, want = (p.module()(tokens(0, 3), context(3)) for p in (program, static))
        torch.testing.assert_close(got, want, **CLOSE)
        assert not torch.allclose(got, model(tokens(0, 3), context(3)), **CLOSE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_skip_aware(Toy(1)), "exported_program: expected what torch.export.export returns, got Toy"),
        (lambda: make_skip_aware(None), "exported_program: expected .*, got NoneType"),
        (lambda: skip_states(None), r"module: expected program.module\(\), got NoneType"),
        (lambda: skip_states(export(Toy(1), (tokens(0), context()))), "module: expected .*, got ExportedProgram"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_strict_export_of_a_diffusers_model() -> None:
    """Its modules are reached through `__dict__`, and a hook on a block replaces its `forward`: names stay paths."""
    wan = WAN_OF_ONE_LAYER
    model, inputs = wan.model(), wan.inputs(0, 0) | {"return_dict": False}
    HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(ModelHook(), "nothing")
    with torch.no_grad():
        want = model(**inputs)
        program = make_skip_aware(export(model, (), kwargs=inputs, strict=True), threshold=-math.inf, tile_shape=TILE)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for ready in (program, program.run_decompositions(), torch.export.load(file)):
            torch.testing.assert_close(ready.module()(**inputs), want, **CLOSE)
    assert [site.name for site in program.sites] == wan.sites
    assert [site.name for site in program.sites if site.swapped] == wan.swapped


# ---- models that hold LiteAttention --------------------------------------------------------------------------------


class ByHand(nn.Module):
    def __init__(self, *, allocate: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96).requires_grad_(False)
        self.attention = lite_attention.LiteAttention(threshold=THRESHOLD)
        if allocate:
            self.attention.allocate(2, 256, 2, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (3 * self.qkv(x)).unflatten(-1, (3, 2, 16)).unbind(2)
        return self.attention(q, k, v).flatten(2)


def test_a_model_that_holds_lite_attention(tmp_path: Path) -> None:
    model = ByHand(allocate=True)
    program = export(model, (tokens(0, seq=256),))
    assert model.attention.state.step() == 0  # tracing is no step
    assert list(program.state_dict) == ["qkv.weight", "qkv.bias"]
    torch.export.save(program, tmp_path / "program.pt2")
    module = torch.export.load(tmp_path / "program.pt2").module()
    for step in range(3):
        x = tokens(step, seq=256)
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x), **CLOSE)
    (state,) = skip_states(module).values()
    assert torch.equal(state.skip_mask, model.attention.state.skip_mask)
    assert state.skip_mask.any()


def test_without_a_state_the_error_names_allocate() -> None:
    with pytest.raises(RuntimeError, match=r"\.allocate\(batch, seq_len, heads, head_dim"):
        export(ByHand(allocate=False), (tokens(0),))


# ---- elsewhere -----------------------------------------------------------------------------------------------------

_ELSEWHERE = """
import sys
import torch

paths = sys.argv[1:]
for path in paths:
    try:
        torch.export.load(path).module()(torch.zeros(1, 96, 32), torch.zeros(1, 24, 32))
    except Exception as error:
        print("refused", "lite_attention" in repr(error))
import lite_attention
for path in paths:
    module = torch.export.load(path).module()
    with torch.no_grad():
        module(torch.zeros(1, 96, 32), torch.zeros(1, 24, 32))
    print("ran")
"""


@pytest.mark.slow
def test_a_saved_program_needs_the_op_where_it_is_loaded(tmp_path: Path) -> None:
    program = skip_aware(Toy(1))
    paths = [tmp_path / name for name in ("training.pt2", "decomposed.pt2")]
    torch.export.save(program, paths[0])
    torch.export.save(program.run_decompositions({}), paths[1])
    result = subprocess.run([sys.executable, "-c", _ELSEWHERE, *paths], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["refused", "refused", "ran", "ran"]
    assert "lite_attention" in result.stdout + result.stderr


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    """One package, run twice: with states of its own, and with states that the caller holds."""
    model = nn.Sequential(Attention(), Attention())
    program, reference = skip_aware(model, tokens(0)), Reference(model)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.compile_wrapper_opt_level": "O0",
        },
    )
    states = {f"{i}.lite_attention.{name}" for i in range(2) for name in STATE}
    constants = {**program.state_dict, **program.constants}
    assert states <= constants.keys()

    own = torch._inductor.aoti_load_package(path)
    assert states <= set(own.get_constant_fqns())  # a constant that is baked in could not be written any more
    own.load_constants(constants, check_full_update=True)
    assert_runs(own, reference)
    fresh = {name: constants[name].clone() for name in states}
    assert not any(fresh[name].any() for name in states if name.endswith("skip_mask"))
    own.load_constants(fresh, check_full_update=False)
    assert_runs(own, reference)
    bolder = {name: torch.full_like(fresh[name], -1.0) for name in states if name.endswith("threshold")}
    own.load_constants({**fresh, **bolder}, check_full_update=False)
    assert_runs(own, Reference(model, threshold=-1.0))

    held = {name: tensor.clone() for name, tensor in constants.items()}
    managed = torch._inductor.aoti_load_package(path)
    managed.load_constants(held, check_full_update=True, user_managed=True)
    assert_runs(managed, reference)
    for i in range(2):
        buffers = {name: held[f"{i}.lite_attention.{name}"] for name in STATE}
        state = SkipState.over(buffers, *TILE)
        (expected,) = (s for (at, *_), s in reference.states.items() if at == str(i))
        assert torch.equal(state.kept_tiles()[0, ..., :6], expected.kept_tiles()[0])
        state.reset()
        state.set_threshold(-1.0)
        state.slot = 1
    bold = Reference(model, threshold=-1.0)
    assert_runs(managed, bold)
    for i in range(2):
        mask = held[f"{i}.lite_attention.skip_mask"]
        assert not mask[0].any()
        (expected,) = (s for (at, *_), s in bold.states.items() if at == str(i))
        assert torch.equal(mask[1], expected.skip_mask[0])
