"""What ranks that share a model do to calibrate it, to report and to save; each against one process that has it all."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import lite_attention
from lite_attention.calibration import autosave, calibrate, calibrate_residual
from lite_attention.ops.torch_internals import default_store
from lite_attention.parallel import agreement
from tests.support import diffusers_models as dm
from tests.support import exchange_cases
from tests.support.context_parallel_cases import (
    HEADS,
    STEPS,
    diffusers_on_cpus,
    enable,
    generation,
    split,
    wan,
)  # fmt: skip

ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
BY_HAND = exchange_cases.Case(count=512)
THRESHOLDS = [-8.0, -6.0, -4.0, -3.0, -2.0, -1.0, -0.5]


def generate_with(model: nn.Module) -> Any:
    def generate(number: int) -> torch.Tensor:
        return torch.stack([dm.run(model, dm.WAN.inputs(step, number)) for step in range(STEPS)])

    return generate


def calibrated(model: nn.Module, **options: Any) -> Any:
    given = {"num_steps": STEPS, "thresholds": THRESHOLDS, "progress": False, "passes": 2, "prompts": range(2)}
    return calibrate(model, generate_with(model), **{**given, **options})


def off(got: Any, want: Any) -> float:
    """Return by how much tables differ at most; infinity where they have other sites or shapes."""
    same = list(got) == list(want) and all(got[site].shape == want[site].shape for site in want)
    pairs = [(got[site], want[site]) for site in want] if same else []
    return max((float(torch.where(a == b, 0.0, (a - b).abs()).max()) for a, b in pairs), default=float("inf"))


@functools.cache
def found_by_one(heads: int, **options: Any) -> Any:
    """Return what one process finds; each rank is one."""
    return calibrated(enable(wan(heads), threshold=-1.0), **options)


def calibration(degrees: dict[str, int], options: dict[str, Any], heads: int = HEADS) -> dict[str, Any]:
    """Return what ranks find, against one process."""
    with diffusers_on_cpus():
        want = found_by_one(heads, **options)
        got = calibrated(enable(split(wan(heads), **degrees), threshold=-1.0), **options)
        return {
            "off": off(got.table, want.table),
            "figures": max(abs(got.table.reached[name] - x) for name, x in want.table.reached.items()),
            "heads": got.verification.rows[0].error.numel(),
            "tokens": got.table.tokens,
            "left_out": want.verification["sparsity"],
            "kinds": len({float(x) for table in want.table.values() for x in table.flatten()}),
        }


# ---- files, by the registry ------------------------------------------------------------------------------------------


def registry(folder: str) -> dict[str, Any]:
    """All ranks calibrate and load by a registry, in all of its ways; rank 0 writes what one process would."""
    config: Any = {"target_error": 0.05, "thresholds": THRESHOLDS, "progress": False}
    with diffusers_on_cpus(), contextlib.ExitStack() as undo:
        one, model = enable(wan(), threshold=-1.0), enable(split(wan(), **ULYSSES), threshold=-1.0)
        want = calibrate(one, generate_with(one), num_steps=STEPS, **config).table
        path = Path(folder) / "thresholds.toml"
        saves = count_saves(undo)
        found = [
            lite_attention.LiteAttentionRegistry.from_model(
                model, "calib", filename=path, calib_config={"generate": generate_with(model), **config}
            )
            for _ in range(2)
        ]
        later = lite_attention.LiteAttentionRegistry.from_model(
            model, "calib", filename=path, calib_config={"target_error": 0.05}, force=True
        )
        generate_with(model)(0)
        later.save_if_calib()
        by_one = enable(wan(), threshold=path)  # a file of ranks is one of the whole model
        generation(by_one)
        return {
            "modes": [registry.mode for registry in found],
            "off": [off(registry.table, want) for registry in found],
            "files": sorted(file.name for file in Path(folder).iterdir()),
            "saved": off(lite_attention.ThresholdTable.load(path), later.table),
            "saves": saves,
        }


def count_saves(undo: contextlib.ExitStack) -> list[str]:
    """Return the names of the files that this rank writes from now on."""
    names: list[str] = []
    save = lite_attention.ThresholdTable.save

    def counted(table: Any, path: Any) -> None:
        names.append(Path(path).name)
        save(table, path)

    undo.enter_context(mock.patch.object(lite_attention.ThresholdTable, "save", counted))
    return names


def results(folder: str, degrees: dict[str, int]) -> list[str]:
    """Return the names of the files that this rank writes of what all ranks found, and are told to save."""
    config: Any = {"num_steps": STEPS, "target_error": 0.05}
    with diffusers_on_cpus(), contextlib.ExitStack() as undo:
        votes = enable(split(wan(), **degrees), threshold=-1.0)
        keeping = enable(split(wan(), **degrees), **RESIDUAL)
        found = {
            "thresholds.toml": calibrate(votes, generate_with(votes), progress=False, thresholds=[-3.0], **config),
            "keep.toml": calibrate_residual(keeping, generate_with(keeping), keeps=(0.5,), **config),
        }
        saves = count_saves(undo)
        for name, of_method in found.items():
            of_method.save(Path(folder) / name)
    dist.barrier()
    return saves


# ---- attention by hand -----------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """One site, whose tokens the ranks share, and whose heads they deal anew from time to time."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        group = {"process_group": dist.group.WORLD, "balance": True} if shared else {}
        self.attn = lite_attention.LiteAttention(num_steps=STEPS, threshold=-2.0, **group)

    def forward(self, step: int) -> torch.Tensor:
        shared = self.attn.exchange is not None
        q, k, v = (exchange_cases.part(x) if shared else x for x in exchange_cases.tokens(BY_HAND, step))
        return self.attn(q, k, v)


def by_hand(calls: int) -> dict[str, Any]:
    """Calibrate where heads have been dealt by what they cost in so many calls before, and would be dealt in it."""
    tables, dealt = [], []
    for shared in (False, True):
        model = ByHand(shared)
        for step in range(calls):
            model(step % STEPS)
        exchange = model.attn.exchange

        def generate(number: int, model: ByHand = model) -> None:
            for step in range(STEPS):
                model(step + number)
            if model.attn.exchange is not None:
                dealt.append(model.attn.exchange.order.tolist())

        options: dict[str, Any] = {"num_steps": STEPS, "target_error": 0.05, "thresholds": THRESHOLDS}
        tables.append(calibrate(model, generate, prompts=range(2), progress=False, **options).table)
    assert exchange is not None
    for step in range(2 * STEPS + 1):  # they go on being dealt
        model(step % STEPS)
    return {
        "off": off(tables[1], tables[0]), "dealt": dealt, "then": exchange.order.tolist(), "held": exchange.is_held,
    }  # fmt: skip


# ---- residuals -------------------------------------------------------------------------------------------------------


RESIDUAL: dict[str, Any] = {
    "threshold": None, "method": "residual", "full_every": 2, "residual_dtype": "fp32", "keep": 0.5,
}  # fmt: skip


def residual(degrees: dict[str, int], heads: int) -> tuple[dict[Any, Any], dict[str, list[float]]]:
    """Return the errors and the shares that a rank found."""
    with diffusers_on_cpus():
        model = enable(split(wan(heads), **degrees), **RESIDUAL)
        found = calibrate_residual(
            model, generate_with(model), num_steps=STEPS, target_error=0.05, keeps=(0.2, 0.5, 0.8)
        )
    return found.errors, {site: share.flatten().tolist() for site, share in found.table.items()}


# ---- what goes wrong on one rank -------------------------------------------------------------------------------------


def not_finite(degrees: dict[str, int], method: str, generation: int) -> tuple[str, str]:
    """Return what a rank raises, and what it met itself, where what rank 1 has gives NaN from a generation on."""
    at = {"now": -1}

    def spoiled(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        is_bad = dist.get_rank() == 1 and at["now"] == generation
        return out.index_fill(1, torch.tensor([out.shape[1] - 1]), torch.nan) if is_bad else out

    with diffusers_on_cpus():
        model = split(wan(), **degrees)
        if "ring_degree" in degrees:  # a query of rank 1
            model.blocks[0].attn1.to_q.register_forward_hook(spoiled)
        inner = generate_with(enable(model, **({"threshold": -1.0} if method == "votes" else RESIDUAL)))

        def generate(number: int) -> torch.Tensor:
            at["now"] += 1
            if "ring_degree" not in degrees and at["now"] == generation:  # the last head, which rank 1 has
                with torch.no_grad():
                    model.blocks[0].attn1.to_v.bias[-1] = torch.nan
            return inner(number)

        return _refused(model, generate, method)


def fails_at(step: int) -> str:
    """What a rank is told where rank 1 fails at a step: while rank 0 waits for it in an exchange, or after all."""
    with diffusers_on_cpus():
        model = enable(split(wan(), **ULYSSES), threshold=-1.0)

        def generate(number: int) -> None:
            for now in range(STEPS + 1):
                if now == step and dist.get_rank() == 1:
                    raise OSError("the disk of rank 1 is full")
                if now < STEPS:
                    dm.run(model, dm.WAN.inputs(now, number))

        return _refused(model, generate)[0]


def _refused(model: nn.Module, generate: Any, method: str = "votes") -> tuple[str, str]:
    """Return what is raised, and the kind of what was met here; a rank may be told first what another met."""
    options: dict[str, Any] = {"num_steps": STEPS, "target_error": 0.05}
    try:
        if method == "votes":
            calibrate(model, generate, progress=False, thresholds=[-3.0], **options)
        else:
            calibrate_residual(model, generate, keeps=(0.5,), **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}", type(error.__cause__ or error).__name__
    return "", ""


def left_in_the_store(degrees: dict[str, int], fail: bool) -> tuple[int, set[int]]:
    """Return how often this rank agreed with those of a group, and how many keys of it are left in the store."""
    with diffusers_on_cpus():
        model = enable(split(wan(), **degrees), threshold=-1.0)
        before, shard = Counter(agreement._count), agreement.shard_of_all(model)
        if fail:  # on rank 1, and then not
            with contextlib.suppress(OSError, RuntimeError), agreement.told_of_errors(shard):
                if dist.get_rank() == 1:
                    raise OSError("the disk of rank 1 is full")
            agreement.texts_of_all(shard, "and on")
        else:
            calibrate(model, generate_with(model), num_steps=STEPS, target_error=0.05, progress=False)
    made = Counter(agreement._count) - before
    store = default_store()
    keys = {of: [agreement._key(of[0], number, of[1]) for number in range(1, agreement._count[of] + 1)] for of in made}
    return min(made.values()), {sum(store.check([key]) for key in of_rank) for of_rank in keys.values()}


# ---- going on after an interrupt -------------------------------------------------------------------------------------


def interrupted(folder: str, lost: bool) -> dict[str, Any]:
    """Both ranks are interrupted, and go on; the file of one may be lost."""
    path = Path(folder) / f"auto{lost}"
    with diffusers_on_cpus(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = enable(split(wan(), **ULYSSES), threshold=-1.0)
        want = found_by_one(HEADS, target_error=0.05).table
        measured: list[int] = []

        def generate(number: int, steps: int = STEPS) -> torch.Tensor:
            return torch.stack([dm.run(model, dm.WAN.inputs(step, number)) for step in range(steps)])

        def stops(number: int) -> None:
            generate(number, 2)
            raise KeyboardInterrupt

        options: dict[str, Any] = {
            "num_steps": STEPS, "thresholds": THRESHOLDS, "progress": False, "passes": 2, "prompts": range(2),
            "target_error": 0.05, "autosave": path,
        }  # fmt: skip
        try:
            calibrate(model, stops, **options)
        except KeyboardInterrupt:
            measured.append(sum(calls for calls in autosave.read(f"{path}.rank{dist.get_rank()}")["measured"].values()))
        if lost and dist.get_rank() == 1:
            Path(f"{path}.rank1").unlink()
        got = calibrate(model, generate, **options).table
    messages = [str(w.message) for w in said if w.filename == __file__]  # where calibrate was called
    return {"off": off(got, want), "measured": measured, "said": [m for m in messages if "begun anew" in m]}
