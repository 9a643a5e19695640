"""What ranks save and load of a model that they share; each function runs on all ranks, against one process."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lite_attention import LiteAttention
from lite_attention.inspection import named_states
from lite_attention.parallel import joined_state_dict
from tests.support import diffusers_models as dm
from tests.support import exchange_cases
from tests.support.context_parallel_cases import STEPS, diffusers_on_cpus, enable, initial_mask, split, wan
from tests.support.exchange_cases import DIM, HEADS, THRESHOLDS, part, tokens

CASE = exchange_cases.Case(count=512)
OPTIONS: dict[str, dict[str, Any]] = {
    "votes": {"threshold": -3.0, "initial_mask": initial_mask},
    "residual": {
        "threshold": None, "method": "residual", "full_every": 2, "residual_dtype": "fp8", "keep": 0.4,
    },
}  # fmt: skip


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether saved states are the same, bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape
        and torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8))
        for name in a
    )


def copied(saved: Any) -> Any:
    """Return what a file gives back."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(model: nn.Module, steps: range, prompt: int = 0) -> list[torch.Tensor]:
    return [dm.run(model, dm.WAN.inputs(step, prompt)) for step in steps]


def saved_of(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    states = named_states(model)
    return {name: copied(joined_state_dict(state, dist.group.WORLD)) for name, state in states.items()}


def of_model(method: str, before: dict[str, Any], then: dict[str, Any], heads: int = HEADS) -> dict[str, Any]:
    """Return how what some ranks saved within a generation compares with one process, and how others go on with it."""
    options = OPTIONS[method]

    def made(degrees: dict[str, Any]) -> nn.Module:
        return enable(split(wan(heads), **degrees) if degrees else wan(heads), **options)

    with diffusers_on_cpus():
        one, model, other = made({}), made(before), made(then)
        for x in (one, model):
            run(x, range(STEPS - 2))
        run(other, range(STEPS - 2), prompt=1)
        saved = saved_of(model) if before else {name: s.state_dict() for name, s in named_states(model).items()}
        want = {name: copied(state.state_dict()) for name, state in named_states(one).items()}
        for name, state in named_states(other).items():
            state.load_state_dict(saved[name])
        again = saved_of(other) if then else {name: s.state_dict() for name, s in named_states(other).items()}
        is_held = [same(again[name], saved[name]) for name in saved]
        last = range(STEPS - 2, STEPS)
        outs = list(zip(run(one, last), run(other, last), strict=True))
        return {
            "same": [same(saved[name], want[name]) for name in want],
            "held": is_held,
            "off": max(float((a - b).abs().max()) for a, b in outs),
            "skipped": max(float(state.sparsity()) for state in named_states(one).values()),
        }


# ---- by hand ---------------------------------------------------------------------------------------------------------


def module(key_ranks: int | None, **options: Any) -> nn.ModuleDict:
    """Return a model of one `LiteAttention`; None = of one process."""
    group, key_group = (None, None) if key_ranks is None else exchange_cases.groups(key_ranks)
    given = {"num_steps": STEPS, "threshold": THRESHOLDS.view(1, 1, HEADS), "persistent_state": True}
    attn = LiteAttention(**{**given, **options}, process_group=group, key_group=key_group)
    return nn.ModuleDict({"attn": attn, "proj": nn.Linear(1, 1)})


def attend(model: Any, step: int) -> torch.Tensor:
    attn = model["attn"]
    x = tokens(CASE, step)
    return attn(*x) if attn.exchange is None else attn(*map(part, x))


def by_hand(method: str, before: int | None, then: int | None) -> dict[str, Any]:
    """Return the same of a module whose state is in the model's `state_dict`; None = one process."""
    options: dict[str, Any] = (
        {"initial_mask": torch.eye(8, dtype=torch.bool).roll(3, 1)[None, None]} if method == "votes" else {}
    )
    if method == "residual":
        options = {"threshold": None, "method": "residual", "keep": 0.4, "full_every": 2, "residual_dtype": "bf16"}
    one, model, other = module(None, **options), module(before, **options), module(then, **options)
    for step in range(2):
        for x in (one, model):
            attend(x, step)
    saved = model.state_dict() if before is None else joined_state_dict(model, dist.group.WORLD)
    saved, keys = copied(saved), [*one.state_dict()]
    other.load_state_dict(copied(saved))
    again = other.state_dict() if then is None else joined_state_dict(other, dist.group.WORLD)
    is_held = same({n: again[n] for n in saved}, saved)
    want = {name: x.clone() for name, x in one["attn"].state_dict().items() if "state." in name}
    got = {name: saved["attn." + name] for name in want}
    off = 0.0
    for step in (2, 3):
        a, b = attend(one, step), attend(other, step)
        off = max(off, float((b - (a if then is None else part(a))).abs().max()))
    return {
        "same": same(got, want), "held": is_held, "off": off, "keys": sorted(saved) == sorted(keys),
        "proj": torch.equal(saved["proj.weight"], model["proj"].weight), "skipped": float(one["attn"].sparsity()),
    }  # fmt: skip


def dealt() -> dict[str, Any]:
    """Return whether a state whose heads were dealt is saved in the order of the model, and cut for those here."""
    options: dict[str, Any] = {"persistent_state": False}
    one, model = module(None, **options), module(1, **options)
    for step in range(3 * STEPS + 2):
        for x in (one, model):
            attend(x, step % STEPS)
    state = model["attn"].state
    saved = joined_state_dict(state, dist.group.WORLD)
    own = copied(state.state_dict())
    one_saved = one["attn"].state.state_dict()
    found = {
        "differ": [name for name in one_saved if not torch.equal(saved[name], one_saved[name])],
        "order": model["attn"].exchange.order.tolist(),
        "not saved": [name for name in model.state_dict() if "state" in name],
    }
    attend(model, 2)
    state.load_state_dict(saved)
    return found | {
        "own": same(state.state_dict(), own),
        "off": float((attend(model, 2) - part(attend(one, 2))).abs().max()),
    }


def thresholds_that_a_deal_would_move() -> list[str]:
    """Return what a dealt module says to a state with thresholds by head, before and after it is given them."""
    saved: dict[str, Any] = {}
    for value in (THRESHOLDS.view(1, 1, HEADS), -4.0):
        model: Any = module(1, persistent_state=False, threshold=value)
        attend(model, 0)
        saved[str(type(value).__name__)] = copied(joined_state_dict(model["attn"].state, dist.group.WORLD))
    other: Any = module(1, persistent_state=False, threshold=-3.0)
    attend(other, 0)
    state = other["attn"].state
    before = copied(state.state_dict())
    found = [told(lambda: state.load_state_dict(saved["Tensor"]))]
    assert same(state.state_dict(), before)
    found.append(told(lambda: state.load_state_dict(saved["float"])))
    other["attn"].set_threshold(THRESHOLDS.view(1, 1, HEADS))
    found.append(told(lambda: state.load_state_dict(saved["Tensor"])))
    found.append(told(lambda: state.load_state_dict(saved["float"])))
    return found


def in_parts() -> str:
    """Return what ranks are told that join a state of some of their heads."""
    model: Any = module(1, persistent_state=False, parts=2)
    attend(model, 0)
    return told(lambda: joined_state_dict(model["attn"].state, dist.group.WORLD))


# ---- what is refused -------------------------------------------------------------------------------------------------


def told(act: Any) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def of_rank_0(kind: str) -> list[str]:
    """Return what a rank is told that loads what rank 0 saved of its own, before and after it has run."""
    if kind == "by hand":
        model: Any = module(1)
        attend(model, 0)
        own, target = model.state_dict(), model
        fresh = module(1)
    else:
        degrees = {"ulysses_degree": 2} if kind == "ulysses" else {"ring_degree": 2}
        with diffusers_on_cpus():
            model = enable(split(wan(), **degrees), threshold=-3.0)
            run(model, range(1))
        target = fresh = next(iter(named_states(model).values()))
        own = target.state_dict()
    sent = [copied(own)]
    dist.broadcast_object_list(sent, 0)
    before = copied(target.state_dict())
    found = [told(lambda: fresh.load_state_dict(sent[0])), told(lambda: target.load_state_dict(sent[0]))]
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())
    return found


def by_one_process() -> str:
    """Return what one process is told that loads what a rank saved."""
    model = module(1)
    attend(model, 0)
    one = module(None)
    return told(lambda: one.load_state_dict(model.state_dict()))


def apart() -> list[str]:
    """Return what ranks are told that made other calls, that have no whole tiles, or of whom one fails."""
    found = []
    model: Any = module(1)
    attend(model, 0)
    if dist.get_rank() == 1:
        model["attn"].state.set_step(3)
    found.append(told(lambda: joined_state_dict(model, dist.group.WORLD)))
    ring: Any = module(2, threshold=-3.0)
    case = CASE._replace(count=200)  # 100 are no multiple of a tile
    ring["attn"](*map(part, tokens(case, 0)))
    found.append(told(lambda: joined_state_dict(ring, dist.group.WORLD)))
    fewer = nn.ModuleList([model["attn"], model["proj"] if dist.get_rank() else copy.copy(model["attn"])])
    found.append(told(lambda: joined_state_dict(fewer, dist.group.WORLD)))
    broken: Any = model if dist.get_rank() == 0 else 3
    found.append(told(lambda: joined_state_dict(broken, dist.group.WORLD)))
    return found


def empty() -> list[str]:
    """Return what is saved of a model that has not run."""
    return sorted(joined_state_dict(module(1), dist.group.WORLD))


def indivisible() -> str:
    """Return what ranks are told whose number does not divide the heads that were saved."""
    one = LiteAttention(num_steps=STEPS, persistent_state=True)
    x = torch.randn(1, 64, 3, DIM)
    one(x, x, x)
    shared = LiteAttention(num_steps=STEPS, persistent_state=True, process_group=dist.group.WORLD)
    return told(lambda: shared.load_state_dict(one.state_dict()))
