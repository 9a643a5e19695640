"""What a configuration of a server may say, and what it is told where it is wrong."""

from __future__ import annotations

import enum
import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lite_attention.integrations.enum_member import add_member
from lite_attention.integrations.serving_options import ServingOptions, layer_index, mapping_of
from lite_attention.presets import preset_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).parents[2]


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def test_nothing_said_is_what_enable_has() -> None:
    options = ServingOptions.of(None)
    settings = options.settings
    assert (settings.method, settings.threshold, settings.slots) == ("votes", -10.0, 3)
    assert (options.dense_steps, options.dense_layers, options.exact_tokens, options.preset) == (
        0,
        frozenset(),
        "auto",
        None,
    )
    assert options.exact_ranges(100, None) == ()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"threshold": -4.0, "use_int8": True}, {"method": "votes", "threshold": -4.0, "quantization": "int8"}),
        ({"method": "residual", "keep": 0.25}, {"keep": 0.25, "slots": 2}),
        ({"preset": "fast"}, {"method": "residual", **preset_of("fast")._asdict(), "slots": 2}),
        ({"preset": "fast", "num_steps": 4}, {**preset_of("fast", 4)._asdict(), "num_steps": 4}),
        ({"preset": "fast", "keep": 0.45}, {"keep": 0.45, "full_every": preset_of("fast").full_every}),
        ({"preset": "fast", "dense_steps": 5, "slots": 4}, {"first_full": 5, "slots": 4}),
    ],
)
def test_options_of_the_sites(config: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = ServingOptions.of(config).settings
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_list_has_a_number_for_each_step() -> None:
    threshold = ServingOptions.of({"threshold": [-5, -2.5]}).settings.threshold
    assert torch.equal(torch.as_tensor(threshold), torch.tensor([[-5.0], [-2.5]]))
    keep = ServingOptions.of({"method": "residual", "keep": [0.5, 0.25]}).settings.keep
    assert torch.equal(torch.as_tensor(keep), torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize(
    ("config", "is_open"),
    [({}, True), ({"slots": 1}, True), ({"keep": 0.5}, False), ({"full_every": 2}, False), ({"num_steps": 9}, False)],
)
def test_a_preset_is_open_until_the_number_of_steps_is_known(config: dict[str, Any], is_open: bool) -> None:
    assert ServingOptions.of({"preset": "balanced", **config}).preset == ("balanced" if is_open else None)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, set()),
        (3, {3}),
        ([1, 4], {1, 4}),
        ("0,1", {0, 1}),
        (" 0, 5 - 7,", {0, 5, 6, 7}),
        ("6-6", {6}),
        ("", set()),
    ],
)
def test_dense_layers(layers: object, expected: set[int]) -> None:
    assert ServingOptions.of({"dense_layers": layers}).dense_layers == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([[0, 20]], ((0, 20),)),
        ([[None, 20], [-30, None]], ((0, 20), (70, 100))),
        ([[90, 200], [-500, 5]], ((0, 5), (90, 100))),
        ([[10, 30], [0, 20]], ((0, 30),)),
        ([[50, -60]], ()),  # in so few tokens
        ([], ()),
        (None, ()),
        ("auto", ((0, 10), (80, 100))),
    ],
)
def test_exact_tokens_are_slices_or_what_is_not_of_the_picture(given: object, expected: tuple[int, ...]) -> None:
    assert ServingOptions.of({"exact_tokens": given}).exact_ranges(100, (10, 80)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tau": 1.0, "treshold": -3}, r"expected options out of \[.*'threshold'.*\], got \['tau', 'treshold'\]"),
        ({"select": 1}, "config: expected"),
        ({"preset": "best"}, "preset: expected one of"),
        ({"preset": "fast", "method": "votes"}, "method: expected none with preset='fast'"),
        ({"threshold": 3.0}, "threshold: expected"),
        ({"threshold": -3.0, "preset": "fast"}, "threshold: expected none with preset='fast'"),
        ({"threshold": []}, "threshold: expected a number, or a list"),
        ({"threshold": [-1, [-2]]}, "threshold: expected a number, or a list"),
        ({"threshold": "-3"}, "threshold: expected a number"),
        ({"method": ["votes"]}, "method: expected 'votes' or 'residual'"),
        ({"preset": "fast", "num_steps": "4"}, "num_steps: expected an integer"),
        ({"dense_steps": -1}, "dense_steps: expected an integer, at least 0|dense_steps: expected at least 0"),
        ({"dense_steps": 2.5}, "dense_steps: expected an integer"),
        ({"method": "residual", "dense_steps": 3, "first_full": 2}, "dense_steps: expected none beside first_full"),
        ({"dense_layers": "1-"}, "dense_layers: expected numbers and ranges, .*, got '1-'"),
        ({"dense_layers": "0, 5-3"}, "dense_layers: expected a range whose end is not before its start, got '5-3'"),
        ({"dense_layers": "0-99999999999"}, "dense_layers: expected numbers up to 9999"),
        ({"dense_layers": [-1]}, "dense_layers: expected a number"),
        ({"dense_layers": [True]}, "dense_layers: expected a number"),
        ({"exact_tokens": [0, 226]}, "exact_tokens: expected a list of pairs"),
        ({"exact_tokens": "0-226"}, "exact_tokens: expected 'auto', or a list of pairs"),
        ({"exact_tokens": [[0, 1.5]]}, "exact_tokens: expected a list of pairs"),
        ({"exact_tokens": [[0, 8], [50, 40]]}, r"exact_tokens: expected a start before its end, got \[50, 40\]"),
        ({"exact_tokens": [[20, 20]]}, "exact_tokens: expected a start before its end"),
        ({"exact_tokens": [[-5, -9]]}, "exact_tokens: expected a start before its end"),
        ({"exact_tokens": [[None, 0]]}, "exact_tokens: expected a start before its end"),
        ({"exact_tokens": 5}, "exact_tokens: expected a list of pairs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions.of(config)


@pytest.mark.parametrize(
    ("path", "number"),
    [("blocks.12.attn1", 12), ("transformer_blocks.3.attn.to_out.0", 3), ("7", 7), ("attention", None), ("v2.x", None)],
)
def test_a_layer_has_the_first_number_of_its_path(path: str, number: int | None) -> None:
    assert layer_index(path) == number


def test_a_configuration_is_json_or_a_file_of_it(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"keep": 0.5}')
    assert mapping_of(' {"keep": 0.5}') == mapping_of(str(file)) == {"keep": 0.5}
    file.write_text("[0.5]")
    with pytest.raises(ValueError, match="configuration: expected a JSON object"):
        mapping_of(str(file))
    with pytest.raises(ValueError, match="configuration: expected JSON"):
        mapping_of("{keep")


def test_a_member_more() -> None:
    green = add_member(Color, "GREEN", 3)
    assert Color["GREEN"] is Color(3) is Color.GREEN is green  # type: ignore[attr-defined]
    assert [*Color] == [Color.RED, Color.BLUE, green]
    assert len({*Color}) == 3
    assert green in Color
    assert isinstance(green, Color)
    assert pickle.loads(pickle.dumps(green)) is green
    assert repr(green) == "<Color.GREEN: 3>"
    assert add_member(Color, "GREEN", 3) is green
    with pytest.raises(ValueError, match="value: expected one that Color does not have, got 1"):
        add_member(Color, "PINK", 1)
    with pytest.raises(AttributeError):
        Color.GREEN = 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("group", ["sglang.multimodal_gen.plugins", "vllm_omni.general_plugins"])
def test_an_entry_point_names_a_function(group: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"][group]["lite_attention"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", ["sglang", "vllm_omni"])
def test_finding_a_plug_in_imports_no_host(name: str) -> None:
    code = f"""
import sys
import lite_attention.integrations.{name}
assert not {{"sglang", "vllm", "vllm_omni", "cutlass", "triton", "diffusers"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)
