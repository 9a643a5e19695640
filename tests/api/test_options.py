"""Options are declared once and mean the same wherever they are given; wrong ones are refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention import LiteAttention, LiteAttentionBackend, LiteAttentionRegistry
from lite_attention.calibration import Calibration, Verification, calibrate, calibrate_residual
from lite_attention.calibration.probe import AttentionProbe, EnableOptions
from lite_attention.calibration.recorder import Recorder, RecorderOptions
from lite_attention.compile.settings import SkipOptions, SkipSettings
from lite_attention.ops.options import StateOptions
from lite_attention.ops.state import SkipState
from lite_attention.registry import CalibrationConfig
from tests.support.toys import TILE, Toy, context, tokens


def test_the_keyword_arguments_of_the_swap_are_the_fields_of_its_settings() -> None:
    assert {*SkipOptions.__annotations__} == {field.name for field in dataclasses.fields(SkipSettings)}


def test_those_of_a_state_are_its_options_and_sizes() -> None:
    sizes = {"batch", "heads", "seq_q", "seq_k", "tile_m", "tile_n", "device"}
    assert {*inspect.signature(SkipState).parameters} - sizes == {*StateOptions.__annotations__}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one tile size": ({"tile_shape": (16,)}, r"tile_shape: expected \(tile_m, tile_n\), got \(16,\)"),
    "tile sizes as text": ({"tile_shape": "ab"}, r"tile_shape: expected \(tile_m, tile_n\), got 'ab'"),
    "a tile size of 0": ({"tile_shape": (16, 0)}, "tile_shape: expected at least 1, got 0"),
    "a fraction of a tile": ({"tile_shape": (16.0, 16)}, "tile_shape: expected an integer, .* got 16.0"),
    "select by name": ({"select": "attn1"}, "select: expected a callable that is given a Site, got str"),
    "a mask as it is": ({"initial_mask": torch.ones(1, 1, 6, 6).bool()}, "initial_mask: expected .* got Tensor"),
    "a fraction of a step": ({"num_steps": 2.5}, "num_steps: expected an integer, .* got 2.5"),
    "no slots": ({"slots": None}, "slots: expected an integer, .* got None"),
    "True slots": ({"slots": True}, "slots: expected an integer, .* got True"),
    "negative steps": ({"max_steps": -1}, "max_steps: expected at least 1, got -1"),
    "no such format": ({"quantization": "int4"}, "quantization: expected .*, got 'int4'"),
    "two formats": ({"quantization": "int8_fp8", "use_int8": True}, "quantization: expected 'int8', .* got 'int8_fp8'"),
    "FP8 alone": ({"use_fp8": True}, "use_fp8: expected use_int8=True"),
    "no such dense": ({"dense": "flash"}, "dense: expected 'sdpa' or 'kernel', got 'flash'"),
    "a threshold as text": ({"threshold": "low"}, "threshold"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_option_is_refused_by_name_and_nothing_is_changed(case: str) -> None:
    options, message = WRONG[case]
    model = Toy(1)
    want = model(tokens(0), context())
    with pytest.raises((ValueError, OSError), match=message):
        lite_attention.enable(model, **{"tile_shape": TILE} | options)
    assert torch.equal(model(tokens(0), context()), want)
    assert lite_attention.enabled.store_of(model) is None
    if "threshold" not in options:
        with pytest.raises(ValueError, match=message):
            LiteAttentionBackend(**options)


def test_those_of_a_calibration_are_handed_on_to_who_takes_them() -> None:
    enabling = {*inspect.signature(lite_attention.enable).parameters} | {*SkipSettings.__dataclass_fields__}
    assert EnableOptions.__optional_keys__ < enabling
    recording = RecorderOptions.__optional_keys__ - EnableOptions.__optional_keys__
    assert recording < {*inspect.signature(Recorder).parameters}
    calibrating = {*inspect.signature(lite_attention.calibrate).parameters} - {"model_or_pipe", "settings"}
    assert CalibrationConfig.__optional_keys__ == calibrating


def _exported() -> torch.export.ExportedProgram:
    return torch.export.export(Toy(1), (tokens(0), context()))


def _configured(**options: Any) -> None:
    from lite_attention.integrations.diffusers import configure

    configure(**options)


def _calibrated_residual(**options: Any) -> Any:
    return calibrate_residual(Toy(1), lambda _: None, num_steps=2, target_error=0.1, **options)


TAKE_OPTIONS: dict[str, Callable[..., Any]] = {
    "enable": lambda **options: lite_attention.enable(Toy(1), **options),
    "LiteAttentionBackend": LiteAttentionBackend,
    "LiteAttention": LiteAttention,
    "LiteAttentionRegistry.from_model": lambda **options: LiteAttentionRegistry.from_model(Toy(1), **options),
    "configure": _configured,
    "make_skip_aware": lambda **options: lite_attention.make_skip_aware(_exported(), **options),
    "AttentionProbe": lambda **options: AttentionProbe(Toy(1), **options),
    "Calibration": lambda **options: Calibration(Toy(1), target_error=0.1, **options),
    "Verification": lambda **options: Verification(Toy(1), {}, **options),
    "calibrate": lambda **options: calibrate(Toy(1), lambda _: None, num_steps=2, target_error=0.1, **options),
    "calibrate_residual": _calibrated_residual,
}
NO_SUCH = {  # what is meant, and what stands there
    "LiteAttention": ("threshold", "tresholdd"), "LiteAttentionRegistry.from_model": ("threshold", "treshold"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKE_OPTIONS)
def test_an_unknown_option_is_a_type_error_that_names_it_and_what_is_near(name: str) -> None:
    meant, wrong = NO_SUCH.get(name, ("tile_shape", "tile_shap"))
    said = rf"^{name}: there is no option '{wrong}'; did you mean '{meant}'.* There are .*\b{meant}\b"
    with pytest.raises(TypeError, match=said) as raised:
        TAKE_OPTIONS[name](**{wrong: TILE})
    listed = str(raised.value).partition("There are ")[2].split(", ")
    assert len(listed) == len({*listed})
    assert not {"model_or_pipe", "self", "cls", "settings"} & {*listed}


def test_what_is_near_nothing_is_told_with_all_that_there_is() -> None:
    said = r"^enable: there is no option 'sparsity'\. There are compile, mode, .*, memory, num_steps$"
    with pytest.raises(TypeError, match=said):
        lite_attention.enable(Toy(1), sparsity=0.5)  # type: ignore[call-arg]


def test_an_operand_may_be_given_by_name() -> None:
    model = Toy(1)
    assert lite_attention.enable(model_or_pipe=model, compile=False) is model
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model_or_pipe'"):
        lite_attention.enable(compile=False)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("args", "options", "got"),
    [
        ((), {"threshold": -6.0}, "threshold="),
        ((), {"options": {}}, "options="),
        ((3,), {}, "int"),
        ((), {}, "nothing"),
    ],
)
def test_a_backend_called_with_options_says_how_one_gets_them(args: tuple[Any, ...], options: Any, got: str) -> None:
    said = rf"^liteattn_backend: expected a graph .*, got {got}; LiteAttentionBackend\(threshold=\.\.\.\) is"
    with pytest.raises(TypeError, match=said):
        lite_attention.liteattn_backend(*args, **options)


def test_our_options_among_those_of_torch_are_told() -> None:
    said = r"options: expected those of torch\.compile, got \['threshold'\], which enable\(\) and"
    for take in (lite_attention.enable, lambda _, **options: _configured(**options)):
        with pytest.raises(ValueError, match=said):
            take(Toy(1), options={"threshold": -6.0})
    compiled = torch.compile(Toy(1), backend=LiteAttentionBackend(tile_shape=TILE), options={"threshold": -6.0})
    with pytest.raises(Exception, match=said):  # dynamo's own
        compiled(tokens(0), context())


COMPILING: dict[str, tuple[dict[str, Any], str]] = {
    "compile as a name": ({"compile": "block"}, "compile: expected True, False or 'blocks', got 'block'"),
    "compile as a tensor": ({"compile": torch.ones(2)}, r"compile: expected True, False or 'blocks', got tensor"),
    "compile as a list": ({"compile": [True]}, r"compile: expected True, False or 'blocks', got \[True\]"),
    "options as a number": ({"options": 3}, r"options: expected a dictionary of those of torch\.compile, got 3"),
    "options as a list": ({"options": ["x"]}, "options: expected a dictionary of those of .*, got"),
    "mode as a number": ({"mode": 3}, "mode: expected a name, or None, got 3"),
    "mode beside options": ({"mode": "default", "options": {"shape_padding": True}}, "mode: expected None beside"),
    "inner as a number": ({"inner": 3}, "inner: expected the name of a backend, or a callable, got 3"),
    "no inner": ({"inner": None}, "inner: expected the name of a backend, or a callable, got None"),
}


@pytest.mark.parametrize(("options", "message"), COMPILING.values(), ids=COMPILING)
def test_what_cannot_compile_is_told_before_a_model_changes(options: dict[str, Any], message: str) -> None:
    model = lite_attention.enable(Toy(1), compile=False, tile_shape=TILE)
    store = lite_attention.enabled.store_of(model)
    with pytest.raises(ValueError, match=message):
        lite_attention.enable(model, **options)
    assert lite_attention.enabled.store_of(model) is store is not None
    with pytest.raises(ValueError, match=message):
        _configured(**options)


@pytest.mark.parametrize("name", ["AttentionProbe", "Calibration", "Verification", "calibrate"])
def test_what_a_calibration_would_not_heed_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: there is no option 'threshold'.* There are .*tile_shape"):
        TAKE_OPTIONS[name](threshold=-4.0)


def test_an_unknown_option_is_told_of_a_model_with_options_of_its_own_too() -> None:
    model = lite_attention.enable(Toy(1), compile=False, tile_shape=TILE)
    with pytest.raises(TypeError, match=r"no option 'tile_shap'"):
        Calibration(model, target_error=0.1, tile_shap=TILE)


@pytest.mark.parametrize(
    ("by_name", "by_switches"),
    [("int8", {"use_int8": True}), ("int8_fp8", {"use_int8": True, "use_fp8": True}), ("none", {})],
)
def test_a_quantization_by_name_is_that_by_switches(by_name: Any, by_switches: dict[str, bool]) -> None:
    assert SkipSettings(quantization=by_name).quantization == SkipSettings(**by_switches).quantization == by_name
    assert SkipSettings(quantization=by_name, **by_switches).quantization == by_name
    assert LiteAttention(quantization=by_name).quantization == LiteAttention(**by_switches).quantization == by_name
    assert dataclasses.replace(SkipSettings(**by_switches), num_steps=3).quantization == by_name


def test_a_module_that_nobody_tells_anything_says_so_once() -> None:
    q = torch.randn(1, 128, 2, 16)
    with pytest.warns(UserWarning, match="nobody tells where a generation ends") as told:
        LiteAttention()(q, q, q)
    assert [warning.filename for warning in told] == [__file__]  # where it is called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LiteAttention()(q, q, q)


@pytest.mark.parametrize("how", ["num_steps", "reset", "reset of the module", "a told branch", "no auto-step"])
def test_a_module_that_is_told_says_nothing(how: str) -> None:
    q = torch.randn(1, 128, 2, 16)
    options = {"num_steps": {"num_steps": 3}, "no auto-step": {"auto_step": False}}.get(how, {})
    module = LiteAttention(**options)
    if how == "reset":
        lite_attention.reset()
    if how == "reset of the module":
        module.reset_skip_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "a told branch":
            with lite_attention.branch("cond", step=0):
                module(q, q, q)
        else:
            module(q, q, q)
