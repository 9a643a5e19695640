"""The node for ComfyUI in ComfyUI itself: its samplers, a tiny Wan model, and its loader of node packs.

ComfyUI is no package of a registry. With a checkout of it on PYTHONPATH these tests run; without one they are skipped.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from lite_attention.integrations import comfyui
from lite_attention.integrations.comfyui import run as runs
from lite_attention.integrations.comfyui.options import DEFAULTS, NodeOptions
from lite_attention.integrations.comfyui.patch import Patch

# What the adapter goes by, as ComfyUI 0.3.64 has it: names of parameters.
RECORDED = {
    "comfy.model_base:BaseModel.apply_model": "self x t c_concat c_crossattn control transformer_options kwargs",
    "comfy.model_patcher:ModelPatcher.add_wrapper_with_key": "self wrapper_type key wrapper",
    "comfy.model_patcher:ModelPatcher.remove_wrappers_with_key": "self wrapper_type key",
    "comfy.model_sampling:ModelSamplingDiscreteFlow.percent_to_sigma": "self percent",
    "comfy.ldm.modules.attention:attention_pytorch": (
        "q k v heads mask attn_precision skip_reshape skip_output_reshape kwargs"
    ),
}


def test_what_is_recorded_is_what_the_adapter_takes() -> None:
    """Its wrapper takes the model's arguments behind the executor, its override those of attention."""
    wrapper, attend = (inspect.signature(f).parameters for f in (Patch._apply_model, runs.Forward.attend))
    assert " ".join(wrapper) == RECORDED["comfy.model_base:BaseModel.apply_model"].replace("self", "self executor", 1)
    assert " ".join(attend) == "self " + RECORDED["comfy.ldm.modules.attention:attention_pytorch"]


@pytest.fixture(scope="module")
def comfy() -> Any:
    """Import ComfyUI for the CPU."""
    pytest.importorskip("comfy.cli_args").args.cpu = True
    pytest.importorskip("comfy_api.latest")
    for name in ("supported_models", "model_patcher", "samplers", "ldm.modules.attention"):
        pytest.importorskip(f"comfy.{name}")
    return importlib.import_module("comfy")


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_is_what_is_installed(name: str, comfy: Any) -> None:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    assert " ".join(inspect.signature(found).parameters) == RECORDED[name]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def as_a_node_is_run() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(comfy: Any) -> Any:
    """Return a `ModelPatcher` of a Wan model with two blocks and random weights."""
    sizes = {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2,
        "text_dim": 16, "text_len": 8, "freq_dim": 32, "in_dim": 16, "out_dim": 16, "dtype": torch.float32,
    }  # fmt: skip
    wan = comfy.supported_models.WAN21_T2V(sizes).get_model({}, device="cpu")
    numbers = torch.Generator().manual_seed(0)
    for weight in wan.parameters():
        one = weight.dim() == 1
        weight.data.copy_(torch.ones(weight.shape) if one else 0.3 * torch.randn(weight.shape, generator=numbers))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(wan, cpu, cpu)


STEPS = 12


def sample(
    comfy: Any, model: Any, sampler: str = "euler", cfg: float = 3.0, sides: tuple[int, ...] = (4, 16, 16)
) -> torch.Tensor:
    """Return latents of 256 tokens after 12 steps with guidance."""
    numbers = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, *sides, generator=numbers)
    positive, negative = ([[torch.randn(1, 8, 16, generator=numbers), {}]] for _ in range(2))
    sampling = comfy.samplers.KSampler(
        model, steps=STEPS, device=torch.device("cpu"), sampler=sampler, scheduler="simple", denoise=1.0
    )
    result: torch.Tensor = sampling.sample(
        noise, positive, negative, cfg=cfg, latent_image=torch.zeros_like(noise), disable_pbar=True, seed=2
    )
    return result


def patched(model: Any, **options: Any) -> Any:
    return Patch(NodeOptions(**{"min_tokens": 1, **options})).put_on(model)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def dense(comfy: Any, model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return sample(comfy, model)


class Seen(list[runs.Run]):
    """The runs that ended, which are otherwise forgotten."""

    @property
    def states(self) -> list[Any]:
        return [memory.state for memory in self[-1].memories.values() if isinstance(memory, runs.Memory)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    ended, finish = Seen(), runs.Run.finish

    def note(self: runs.Run) -> None:
        ended.append(self)
        finish(self)

    monkeypatch.setattr(runs.Run, "finish", note)
    return ended


@pytest.mark.parametrize("sampler", ["euler", "heun", "uni_pc", "res_multistep"])
def test_sampling_skips_and_stays_near(comfy: Any, model: Any, sampler: str, seen: Seen) -> None:
    fast = patched(model, preset="fast")
    latents = sample(comfy, fast, sampler)
    assert 1e-4 < error(latents, sample(comfy, model, sampler)) < 0.1
    assert len(seen.states) == 4 * (2 if sampler == "heun" else 1)  # two blocks, two conditionings
    assert all(float(state.sparsity()) > 0.5 for state in seen.states)
    assert set(seen[-1].reasons) == {"cross-attention"}
    assert torch.equal(sample(comfy, fast, sampler), latents)  # each run starts fresh


@pytest.mark.parametrize(
    "options",
    [{"exact_tokens": ":"}, {"dense_blocks": "0-1"}, {"min_tokens": 257}, {"start_percent": 0.999}],
    ids=lambda options: next(iter(options)),
)
def test_where_nothing_may_be_skipped_it_is_dense(
    comfy: Any, model: Any, dense: torch.Tensor, options: dict[str, Any]
) -> None:
    assert error(sample(comfy, patched(model, **options)), dense) < 1e-5


def test_the_model_itself_stays_as_it_is(comfy: Any, model: Any, dense: torch.Tensor) -> None:
    sample(comfy, patched(model))
    assert torch.equal(sample(comfy, model), dense)


def test_conditionings_that_do_not_fit_into_one_batch(
    comfy: Any, model: Any, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    """Memory decides whether they come together, in each step anew; the result is the same but for rounding."""
    together = sample(comfy, patched(model))
    calls = iter(range(10**6))
    monkeypatch.setattr(
        type(model.model), "memory_required", lambda self, shape, **kwargs: 1e18 if next(calls) % 3 else 0.0
    )
    apart = sample(comfy, patched(model))
    assert error(apart, together) < 1e-4
    assert len(seen.states) == 4


@pytest.mark.parametrize(
    ("options", "conditionings"),
    [({}, 2), ({"dense_blocks": "1"}, 2), ({"preset": "votes"}, 2), ({"min_tokens": 257}, 0), ({}, 1)],
    ids=["residual", "a dense block", "votes", "short", "no guidance"],
)
def test_room_is_left_for_the_memories(
    comfy: Any, model: Any, monkeypatch: pytest.MonkeyPatch, seen: Seen, options: dict[str, Any], conditionings: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """ComfyUI is told as many bytes as the states have in the end."""
    needed: list[tuple[float, float]] = []
    load = comfy.model_management.load_models_gpu

    def note(*args: Any, memory_required: float, minimum_memory_required: float, **kwargs: Any) -> Any:
        needed.append((memory_required, minimum_memory_required))
        return load(*args, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    cfg = 1.0 if conditionings == 1 else 3.0
    with caplog.at_level("INFO", "lite_attention"):
        sample(comfy, patched(model, **options), cfg=cfg)
        sample(comfy, model, cfg=cfg)
    taken = sum(state.nbytes for state in seen.states)
    more = [with_node - without for with_node, without in zip(*needed, strict=True)]
    assert more == pytest.approx([taken, taken], rel=0.02, abs=1024)  # tables of steps
    said = [text for text in caplog.messages if "will take" in text]
    assert len(said) == bool(conditionings and options.get("preset") != "votes")
    assert all(f"{conditionings} conditioning(s)" in text for text in said)
    assert "memory_required" not in vars(model.model)


def test_two_models_have_nodes_of_their_own(comfy: Any, model: Any, seen: Seen) -> None:
    """As Wan 2.2 has them: one begins, the other goes on; each begins with what it learns itself."""
    high, low = patched(model, preset="fast"), patched(model, preset="quality")
    alone = [sample(comfy, node) for node in (high, low)]
    together = [sample(comfy, node) for node in (high, low, high)]
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[0])
    assert len(seen) == 5


def test_an_interrupted_sampling_leaves_nothing(comfy: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = patched(model)
    latents = sample(comfy, node)
    interrupted = comfy.model_management.InterruptProcessingException
    calls, apply = iter(range(10**6)), type(model.model)._apply_model

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 5:
            raise interrupted
        return apply(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "_apply_model", stop)
        with pytest.raises(interrupted):
            sample(comfy, node)
    assert torch.equal(sample(comfy, node), latents)


def test_another_size_in_the_next_sampling(comfy: Any, model: Any, seen: Seen) -> None:
    node = patched(model, preset="fast")
    latents = sample(comfy, node)
    other = sample(comfy, node, sides=(4, 24, 16))
    assert error(other, sample(comfy, model, sides=(4, 24, 16))) < 0.1
    assert torch.equal(sample(comfy, node), latents)
    assert [run.memories and len(run.memories) for run in seen] == [4, 4, 4]


def test_the_later_node_holds(comfy: Any, model: Any, seen: Seen) -> None:
    once, twice = patched(model, preset="fast"), patched(patched(model), preset="fast")
    assert torch.equal(sample(comfy, twice), sample(comfy, once))
    assert len(seen) == 2


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_override_of_another_node_gets_what_is_declined(comfy: Any, model: Any, order: str, seen: Seen) -> None:
    """Whether it was set before or after the node."""
    lengths = set()

    def other(func: Any, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.add(k.shape[1])
        return func(q, k, *args, **kwargs)

    both = model.clone() if order == "before" else patched(model)
    both.model_options["transformer_options"]["optimized_attention_override"] = other
    both = patched(both) if order == "before" else both
    assert torch.equal(sample(comfy, both), sample(comfy, patched(model)))
    assert lengths == {8}  # of the text; the video's attention is the node's
    assert len(seen.states) == 4


def test_a_later_node_that_changes_the_noise_levels(comfy: Any, model: Any, seen: Seen) -> None:
    """Percents are of the noise levels that are sampled with."""
    late = patched(model, start_percent=0.5)
    shifted = late.clone()
    sampling = comfy.model_base.model_sampling(model.model.model_config, comfy.model_base.ModelType.FLOW)
    sampling.set_parameters(shift=1.0, multiplier=1000)
    shifted.add_object_patch("model_sampling", sampling)
    sample(comfy, late)
    sample(comfy, shifted)
    assert [len(run.schedule.skipping) for run in seen] == [6, 6]
    assert seen[1].schedule.highest == pytest.approx(0.5)
    assert seen[0].schedule.highest > 0.8


@pytest.mark.slow
def test_a_compiled_model(comfy: Any, model: Any) -> None:
    """The override breaks its graphs, and compiles nothing again."""
    helper = pytest.importorskip("comfy_api.torch_helpers")
    compiled = patched(model)
    helper.set_torch_compile_wrapper(model=compiled, backend="eager")
    torch._dynamo.utils.counters.clear()
    latents = sample(comfy, compiled)
    once = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(sample(comfy, compiled), latents)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == once
    assert error(latents, sample(comfy, patched(model))) < 1e-4


@pytest.fixture
def pack(comfy: Any, tmp_path: Path) -> Any:
    """Copy the folder to where ComfyUI looks for node packs, and let it load the copy; return its table of nodes."""
    nodes = pytest.importorskip("nodes")
    folder = tmp_path / "custom_nodes" / "comfyui-lite-attention"
    shutil.copytree(Path(comfyui.__file__).parent, folder)
    assert asyncio.run(nodes.load_custom_node(str(folder), module_parent="custom_nodes"))
    return nodes


def test_the_copied_folder_is_loaded(comfy: Any, model: Any, pack: Any) -> None:
    node = pack.NODE_CLASS_MAPPINGS["LiteAttention"]
    assert pack.NODE_DISPLAY_NAME_MAPPINGS["LiteAttention"] == "LiteAttention"
    given = node.INPUT_TYPES()["required"]
    assert {name: options["default"] for name, (_, options) in given.items() if name != "model"} == DEFAULTS
    (clone,) = node.execute(model, **{**DEFAULTS, "min_tokens": 1}).result
    assert torch.equal(sample(comfy, clone), sample(comfy, patched(model)))
    with pytest.raises(ValueError, match="dense_blocks: expected numbers"):
        node.execute(model, **{**DEFAULTS, "dense_blocks": "all"})


def test_a_file_of_one_line_is_loaded(pack: Any, tmp_path: Path) -> None:
    """The README names it as the other way to install the node."""
    readme = (files(comfyui) / "README.md").read_text()
    (line,) = (line.strip() for line in readme.splitlines() if "import comfy_entrypoint" in line)
    (tmp_path / "lite_attention_node.py").write_text(line)
    del pack.NODE_CLASS_MAPPINGS["LiteAttention"]
    assert asyncio.run(pack.load_custom_node(str(tmp_path / "lite_attention_node.py"), module_parent="custom_nodes"))
    assert "LiteAttention" in pack.NODE_CLASS_MAPPINGS


def test_the_workflow_fits_the_nodes(pack: Any) -> None:
    """All required inputs are there, none is unknown, and each link is of the type that is asked for."""
    for name in ("nodes_model_advanced", "nodes_hunyuan", "nodes_video"):
        module = pytest.importorskip(f"comfy_extras.{name}")
        assert asyncio.run(pack.load_custom_node(module.__file__, module_parent="comfy_extras"))
    workflow = json.loads((files(comfyui) / "wan_text_to_video.json").read_text())
    classes = {key: pack.NODE_CLASS_MAPPINGS[node["class_type"]] for key, node in workflow.items()}
    for key, node in workflow.items():
        types = classes[key].INPUT_TYPES()
        required, optional = types["required"], types.get("optional", {})
        assert set(required) <= set(node["inputs"]) <= set(required) | set(optional), node["class_type"]
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                assert classes[value[0]].RETURN_TYPES[value[1]] == {**required, **optional}[name][0]
