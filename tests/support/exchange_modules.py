"""What a rank does with a `LiteAttention` that has a process group; each function runs on all ranks."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lite_attention.parallel
from lite_attention import LiteAttention, ThresholdTable
from lite_attention.model_sites import sites_of
from lite_attention.ops import ResidualState, SkipState
from lite_attention.ops import control as c
from lite_attention.ops.site import Site
from tests.support.exchange_cases import BATCH, DIM, HEADS, STEPS, THRESHOLDS, Case, groups, part, tokens

CASE = Case(count=512)


def new_module(**options: Any) -> LiteAttention:
    return LiteAttention(**{"num_steps": STEPS, "process_group": dist.group.WORLD, **options})


def local(step: int, case: Case = CASE) -> list[torch.Tensor]:
    return [part(x) for x in tokens(case, step)]


class Residuals(NamedTuple):
    """What a rank's module of method "residual" gives beside processes that have the heads of the ranks."""

    error: float
    same_masks: bool
    heads: list[list[int]]  # of all ranks
    costs: list[float]  # by head, at the end


RESIDUAL: dict[str, Any] = {
    "method": "residual", "keep": 0.4, "full_every": 2, "residual_dtype": "fp32",
    "initial_mask": torch.arange(256).view(1, 4, 8, 8) % 7 == 1,
}  # fmt: skip


def residual(costs: list[float] | None = None, backend: str = "") -> Residuals:
    """Run two generations, the second with heads that are dealt by what they cost, if that is told."""
    model = nn.ModuleDict({"attn": new_module(**RESIDUAL)})
    ours: Any = model["attn"]
    ours.allocate(BATCH, CASE.count, HEADS, DIM)
    torch._dynamo.reset()
    run: Any = torch.compile(ours, fullgraph=True, backend=backend) if backend else ours
    worst, singles, dealt = 0.0, [], torch.empty(0)
    for call in range(2 * STEPS):
        if call == STEPS and costs is not None:
            lite_attention.parallel.deal_heads(model, {"attn": costs})
        q, k, v = tokens(CASE, call % STEPS)
        got = run(*local(call % STEPS), seq_len=CASE.count)
        if call % STEPS == 0:
            dealt = ours.exchange.order.view(dist.get_world_size(), -1)
            mask = RESIDUAL["initial_mask"]
            singles = [LiteAttention(num_steps=STEPS, **{**RESIDUAL, "initial_mask": mask[:, h]}) for h in dealt]
        expected = torch.empty_like(q)
        for single, h in zip(singles, dealt, strict=True):
            expected[:, :, h] = single(q[:, :, h], k[:, :, h], v[:, :, h])
        worst = max(worst, float((got - part(expected)).abs().max()))
    state: Any = singles[dist.get_rank()].state
    same = isinstance(ours.state, ResidualState) and torch.equal(ours.state.skip_mask, state.skip_mask)
    found = lite_attention.parallel.head_costs(model)
    lite_attention.parallel.deal_heads(model, found)
    return Residuals(worst, same, dealt.tolist(), found["attn"])


NO_TENSORS = {"no query": "q", "no key": "k", "no tensors": "qkv"}


def refused(kind: str) -> list[str]:
    """Return what this rank is told of a call that does not fit, here or on rank 1 alone, and then of one that does."""
    case = CASE._replace(count=510 if kind == "tokens" else 512)
    q, k, v = local(0, case)
    is_one = dist.get_rank() == 1
    options: dict[str, dict[str, Any]] = {"parts": {"parts": 1 + is_one}, "balance": {"balance": is_one}}
    module = new_module(**options.get(kind, {}))
    if kind == "costs" and is_one:
        lite_attention.parallel.deal_heads(nn.ModuleDict({"attn": module}), {"attn": [4.0, 3.0, 1.0, 2.0]})
    if kind == "heads":
        q, k, v = (x[:, :, :3] for x in (q, k, v))
    elif kind == "tokens" and is_one:
        q, k, v = (x[:, :-1] for x in (q, k, v))
    elif kind == "dtype" and is_one:
        q, k, v = (x.double() for x in (q, k, v))
    elif kind == "values of one rank" and is_one:
        v = v[:, :-1]
    elif kind in NO_TENSORS and is_one:
        q, k, v = (None if name in NO_TENSORS[kind] else x for name, x in zip("qkv", (q, k, v), strict=True))
    elif kind == "dimensions of one rank" and is_one:
        q = q[0, 0]
    told = []
    counts: dict[str, Any] = {"no count": 512.0, "a list": [512] if is_one else None}
    seq_len = counts.get(kind)
    then = new_module() if kind in ("parts", "balance", "costs") else module
    for at, call, count in ((module, (q, k, v), seq_len), (then, local(0), None)):
        try:
            at(*call, seq_len=count)
            told.append("fits")
        except ValueError as error:
            told.append(str(error))
    return told


def by_hand(parts: int) -> dict[str, Any]:
    """Return what options, copies and files make of a module that has run a generation and a half."""
    module = new_module(threshold=THRESHOLDS.view(1, 1, HEADS), parts=parts)
    run = STEPS + STEPS // 2
    for step in range(run):
        module(*local(step % STEPS))
    assert module.exchange is not None
    assert len(module.states) == parts
    file = io.BytesIO()
    pickle.dump(module, file)
    file.seek(0)
    twins = [copy.copy(module), copy.deepcopy(module), pickle.load(file)]
    found: dict[str, Any] = {"heads": module.exchange.own_heads.tolist()}
    for step in range(run, 4 * STEPS):  # copies go on alike, through deals of their own
        expected = module(*local(step % STEPS))
        for twin in twins:
            assert torch.equal(twin(*local(step % STEPS)), expected)
    found["heads later"] = [m.exchange.own_heads.tolist() for m in (module, *twins)]
    module.set_threshold(10 * THRESHOLDS)
    for name in ("written", "still there"):
        thresholds = torch.cat([s.threshold[0, 0] for s in module.states if isinstance(s, SkipState)])
        found[name] = torch.equal(thresholds, 10 * THRESHOLDS[module.exchange.own_heads])
        module(*local(0))
    try:
        module.set_threshold(THRESHOLDS[:2])  # as many as a rank has
    except ValueError as error:
        found["told"] = str(error)
    module.set_threshold(-math.inf)
    module.reset_skip_state()
    out = [module(*local(step)) for step in (0, 1)]
    found["dense"] = float(module.sparsity()) == 0.0
    found["by head"] = module.sparsity("head").shape[0]
    module.enable_skip_optimization(False)
    words = [int(s.control[c.FLAGS]) & c.FLAG_DENSE for s in module.states]
    found["off"] = words == [c.FLAG_DENSE] * parts
    found["site"] = module.site("attn").q_shape
    on_meta = new_module(parts=parts).allocate(BATCH, CASE.count, HEADS, DIM).to("meta").to_empty(device="cpu")
    found["from meta"] = torch.allclose(on_meta(*local(0)), out[0], atol=0.2)
    return found


def saved() -> bool:
    """Return whether a persistent state comes back from a `state_dict`."""
    module, other = (new_module(persistent_state=True) for _ in range(2))
    for step in range(2 * STEPS - 1):
        module(*local(step % STEPS))
    assert module.exchange is not None
    assert module.exchange.own_heads.tolist() == part(torch.arange(HEADS), 0).tolist()
    assert lite_attention.parallel.head_costs(nn.ModuleDict({"attn": module})) == {}  # none that could be dealt
    other.load_state_dict(module.state_dict())
    other.set_threshold(module.state.threshold.new_full((HEADS,), -10.0))  # it knows its heads before it runs
    return torch.equal(module(*local(STEPS - 1)), other(*local(STEPS - 1)))


def failed_alone(parts: int, kind: str) -> tuple[str, list[bool], bool]:
    """Return what a call says which rank 1 alone gets wrong, what heads are NaN, and whether the next is right.

    It is wrong by its "ranges", or its queries require a "gradient".
    """
    is_one = dist.get_rank() == 1
    ranges = [5, 3] if is_one and kind == "ranges" else None
    single, module = LiteAttention(num_steps=None), new_module(num_steps=None, parts=parts)
    told, of_heads = "", torch.zeros(HEADS)
    q, k, v = local(0)
    try:
        q = q.clone().requires_grad_(is_one and kind == "gradient")
        of_heads = module(q, k, v, must_do_list=ranges).sum((0, 1, 3))
    except (ValueError, RuntimeError) as error:
        told = str(error)
    for x in (single, module):
        x.reset_skip_state()
    error = (module(*local(1)) - part(single(*tokens(CASE, 1)))).abs().max()
    return told, of_heads.isnan().tolist(), float(error) < 1e-6


class Swallowed(NamedTuple):
    """What becomes of a module whose call failed on one rank alone, where the loop went on."""

    told: list[str]  # by call
    heads: list[list[int]]  # of this rank, by generation
    steps: list[list[int]]  # of its states, by call
    error: float  # in the generations after that one


def swallowed(call: int, parts: int, failing: int) -> Swallowed:
    """Run four generations; attention of a part of rank 1 fails at a call, which that rank swallows."""
    single, module = (LiteAttention(num_steps=STEPS, threshold=-3.5), new_module(threshold=-3.5, parts=parts))
    attend, now = module._attend, 0

    def failing_once(*args: Any, part: int = 0, **kwargs: Any) -> Any:
        if (now, part, dist.get_rank()) == (call, failing, 1):
            raise ValueError("this once")
        return attend(*args, part=part, **kwargs)

    module._attend = failing_once  # type: ignore[method-assign]
    found, after = Swallowed([], [], [], 0.0), (call // STEPS + 1) * STEPS
    assert module.exchange is not None
    for now in range(4 * STEPS):
        expected, told = part(single(*tokens(CASE, now % STEPS))), ""
        try:
            error = float((module(*local(now % STEPS)) - expected).abs().max())
            found = found._replace(error=max(found.error, error if now >= after else 0.0))
        except ValueError as failure:
            told = str(failure)
        found.told.append(told)
        found.steps.append([state.step() for state in module.states])
        if now % STEPS == 0:
            found.heads.append(module.exchange.own_heads.tolist())
    return found


def mistaken(parts: int) -> tuple[list[str], float, bool]:
    """Return what is told of calls that all get wrong, and whether what follows is as if there were none."""
    single, module = (LiteAttention(num_steps=STEPS, threshold=-3.5), new_module(threshold=-3.5, parts=parts))
    told, errors = [], []
    assert module.exchange is not None
    for call in range(3 * STEPS):
        if call in (0, STEPS + 1, 2 * STEPS):
            try:
                module(*local(call % STEPS), must_do_list=[5, 3])
            except ValueError as error:
                told.append(str(error)[:15])
        expected = part(single(*tokens(CASE, call % STEPS)))
        errors.append(float((module(*local(call % STEPS)) - expected).abs().max()))
    assert isinstance(single.state, SkipState)
    masks = torch.cat([state.skip_mask for state in module.states], 2)
    return told, max(errors), torch.equal(masks, single.state.skip_mask[:, :, module.exchange.own_heads])


def no_room_on_one() -> tuple[str, int, float]:
    """Return what a rank is told where rank 1 has no memory for a state, how many it has, and how far it is off."""
    single, module = LiteAttention(num_steps=STEPS), new_module()
    new_states, told = module._new_states, ""

    def too_large(*_: Any) -> Any:
        raise RuntimeError("no memory is left")

    if dist.get_rank() == 1:
        module._new_states = too_large  # type: ignore[method-assign]
    try:
        module(*local(0))
    except RuntimeError as error:
        told = str(error)
    states = len(module.states)
    module._new_states = new_states  # type: ignore[method-assign]
    errors = [(module(*local(i)) - part(single(*tokens(CASE, i)))).abs().max() for i in range(2 * STEPS)]
    return told, states, float(max(errors))


def heads_in_turn(kinds: list[tuple[int, int]]) -> tuple[float, list[bool]]:
    """Return how far a module is off one process that has so many heads and key heads in turn, and what was dealt."""
    single, ours = LiteAttention(num_steps=STEPS, threshold=-3.5), new_module(threshold=-3.5)
    errors, moved = [], []
    assert ours.exchange is not None
    for call in range(8 * STEPS):
        heads, kv_heads = kinds[call // (2 * STEPS) % len(kinds)]
        q, k, v = tokens(CASE, call)
        x = q[:, :, :heads], k[:, :, :kv_heads], v[:, :, :kv_heads]
        errors.append(float((ours(*map(part, x)) - part(single(*x))).abs().max()))
        moved.append(ours.exchange.order.tolist() != [*range(heads)])
    return max(errors), moved


def pickled_by_rank_0() -> str:
    """Return what a rank is told that loads what rank 0 pickled."""
    pickled = [pickle.dumps(new_module())]
    dist.broadcast_object_list(pickled, 0)
    try:
        pickle.loads(pickled[0])
    except ValueError as error:
        return str(error)
    return "loaded"


def traced_with_fewer_key_heads() -> str:
    """Return what a traced call says whose heads share keys, where those of the state do not."""
    module = new_module().allocate(BATCH, CASE.count, HEADS, DIM)
    torch._dynamo.reset()
    run: Any = torch.compile(module, fullgraph=True, backend="eager")
    try:
        run(*local(0, CASE._replace(kv_heads=2)))
    except torch._dynamo.exc.Unsupported as error:
        return str(error)
    return "nothing was refused"


def in_a_model(parts: int) -> dict[str, Any]:
    """Return what those see who ask a model for its sites, and set the thresholds of all heads by them."""
    model = nn.ModuleDict({"attn": new_module(parts=parts)})
    module: Any = model["attn"]
    module(*local(0))
    (site,) = sites_of(model)
    heads: list[int] = []

    def by_site(site: Site) -> torch.Tensor:
        heads.append(site.q_shape[2])
        return THRESHOLDS

    lite_attention.set_threshold(model, by_site)
    table = ThresholdTable({"attn": THRESHOLDS.view(1, 1, HEADS).expand(2, STEPS, HEADS)}, {})
    table.apply(model)
    thresholds = torch.cat([state.threshold[1, 2] for state in module.states])
    return {
        "heads": [site.heads, *heads], "written": torch.equal(thresholds, THRESHOLDS[module.exchange.own_heads]),
        "states": len(site.states), "shard": site.shard.head_ranks,
    }  # fmt: skip


def reset_by_one(key_ranks: int) -> list[str]:
    """Return what each call says where rank 0 alone begins a generation, and so has other heads; then all do."""
    group, key_group = groups(key_ranks)
    module = new_module(num_steps=None, process_group=group, key_group=key_group)
    told = []
    for call in range(16):
        if call == 8 or (call == 4 and dist.get_rank() == 0):
            module.reset_skip_state()
        try:
            module(*local(call))
            told.append("")
        except RuntimeError as error:
            told.append(str(error))
    return told


def shapes_alone() -> tuple[torch.Size, bool]:
    """Return the shape of what fake tensors give, and whether they leave what was learned alone."""
    module = new_module()
    for step in range(STEPS):
        module(*local(step))
    before = [x.clone() for state in module.states for x in state.buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = module(*(mode.from_tensor(x) for x in local(0)))
    after = [x for state in module.states for x in state.buffers()]
    return out.shape, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


WRONG_COSTS: list[Any] = [
    {"attention": [1.0] * 4}, {"attn": [1.0] * 3}, {"attn": [math.nan] * 4}, {"attn": [1, 2, 3, "4"]},
    {"attn": [1, 2, 3, None]}, {"attn": 4.0}, {"attn": None}, {"attn": [1, 2, 3, 10**400]}, {"attn": [[1, 2]] * 4},
    [1.0] * 4,
]  # fmt: skip


def another_run(key_ranks: int) -> dict[str, Any]:
    """Return what a second model does with the costs that the first one found."""
    group, key_group = groups(key_ranks)
    single = LiteAttention(num_steps=None, threshold=-3.5)
    first, second = (
        nn.ModuleDict({"attn": new_module(num_steps=None, threshold=-3.5, process_group=group, key_group=key_group)})
        for _ in range(2)
    )
    empty = lite_attention.parallel.head_costs(first)
    for step in range(STEPS):
        single(*tokens(CASE, step))
        first["attn"](*local(step))
    costs = lite_attention.parallel.head_costs(first)
    expected = (1 - single.sparsity("head")).tolist()
    lite_attention.parallel.deal_heads(second, json.loads(json.dumps(costs)))
    single.reset_skip_state()
    worst = 0.0
    for step in range(STEPS):
        got = second["attn"](*local(step))
        worst = max(worst, float((got - part(single(*tokens(CASE, step)))).abs().max()))
    later: Any = second["attn"]
    found = {"heads": later.exchange.own_heads.tolist(), "error": worst, "empty": empty}
    lite_attention.parallel.deal_heads(second, {"attn": [4.0, 3.0, 1.0, 2.0]})
    later.reset_skip_state()
    later(*local(0))
    told = []
    for wrong in WRONG_COSTS:
        try:
            lite_attention.parallel.deal_heads(second, wrong)
        except ValueError as error:
            told.append(str(error))
    off = max(abs(a - b) for a, b in zip(costs["attn"], expected, strict=True))
    return {**found, "off": off, "told": told, "dealt by hand": later.exchange.own_heads.tolist()}
