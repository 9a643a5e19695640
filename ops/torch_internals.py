"""Each private name of torch that this package relies on, and why: a new version of torch is this file's work.

Light to import: dynamo, inductor and sympy load with the first call that needs them. What `Memory` and `LiteAttention`
override of `nn.Module` (`_apply`, `_load_from_state_dict`, `_replicate_for_data_parallel`) is said there.
"""

from __future__ import annotations

import copy
import functools
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType, FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = [
    "AUTO_FUNCTIONALIZED", "FLASH_ON_CPU", "WRAPPED", "FakeModes", "FakeTensor", "FakeTensorMode", "add_to_each",
    "all_gather", "all_to_all", "arrived", "backend_named", "below_autograd", "call_of", "compile_with_inductor",
    "constant_when_compiled", "copy_of_graph", "example_of", "excluding_key", "fake_mode_of", "forget_compiled",
    "group_named", "holds_for_all_sizes", "holds_unless_unknown", "in_forward_mode", "input_path", "is_fake",
    "is_held_by_module", "is_op", "is_wrapper", "mark_static_input", "module_ids", "module_text", "op_name",
    "override", "override_of", "plain_call", "raw_stream", "running_module", "storage_key", "traced_call",
    "tree_leaves", "uncompiled", "under_mode", "unwrapped", "upper_bound", "writes", "written_arguments", "zero_each",
]  # fmt: skip

# What `run_decompositions` makes of an op that writes into its arguments.
AUTO_FUNCTIONALIZED: Any = torch.ops.higher_order.auto_functionalized_v2

# Attention with its LSE, which scaled_dot_product_attention keeps to itself.
FLASH_ON_CPU: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_Function = TypeVar("_Function", bound=Callable[..., Any])

# ---- what surrounds a call of an op --------------------------------------------------------------------------------


def below_autograd() -> Any:
    """Return a context in which ops are called past autograd, as its kernels have to."""
    return torch._C._AutoDispatchBelowAutograd()


def excluding_key(key: str) -> Callable[[], Any]:
    """Return what makes contexts in which the dispatcher passes over a key, such as "AutocastCPU"."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return functools.partial(torch._C._ExcludeDispatchKeyGuard, keys)


def in_forward_mode() -> bool:
    """Return whether forward-mode derivatives are on: it spares other calls 1 us of looking for tangents."""
    return forward_ad._current_level >= 0


def under_mode() -> bool:
    """Return whether a TorchDispatchMode or a transform of torch.func is on, under which tensors may have no values."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None)


def constant_when_compiled(function: _Function) -> _Function:
    """Let compiled code take what a function returns for a constant.

    As `torch.compiler.assume_constant_result`, which loads dynamo.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def raw_stream(device: torch.device) -> int:
    """Return what tells the current stream of a GPU from others; `torch.cuda.current_stream` makes an object."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


# ---- tensors and ops -----------------------------------------------------------------------------------------------


def storage_key(tensor: torch.Tensor) -> int | None:
    """Return what tells the storage of a tensor from all others alive. Fake tensors have no data_ptr to go by.

    None if it has no storage of its own, as within torch.func.vmap.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None


def fake_mode_of(values: Sequence[object]) -> FakeTensorMode | None:
    """Return the mode that the fake tensors among the values belong to: new ones must be of the same."""
    return detect_fake_mode(values)


def is_fake(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no values to read: on the meta device, or of a fake mode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Return whether a tensor stands for others, as DTensor and nested tensors do, so that each op needs a rule."""
    return is_traceable_wrapper_subclass(tensor)


def zero_each(tensors: list[torch.Tensor]) -> None:
    """Fill tensors with zeros: one launch for all."""
    torch._foreach_zero_(tensors)


def add_to_each(tensors: list[torch.Tensor], value: float) -> None:
    """Add a number to tensors, in place: one launch for all."""
    torch._foreach_add_(tensors, value)


def is_op(target: object) -> bool:
    """Return whether a node's target is an op of torch.library, which has a schema."""
    return isinstance(target, torch._ops.OpOverload)


def op_name(target: Any) -> str:
    """Return "namespace::name" of an op, without the overload."""
    return str(target._schema.name)


def writes(op: Any) -> bool:
    """Return whether an op writes into any of its arguments."""
    return bool(op._schema.is_mutable)


def written_arguments(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments of an op that its schema says it writes into."""
    schema = target._schema.arguments
    given = {a.name: x for a, x in zip(schema, args, strict=False)} | kwargs
    return [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]


# ---- sizes that are symbols ----------------------------------------------------------------------------------------


def holds_for_all_sizes(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes is true whatever the sizes; unlike bool(), it adds no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def holds_unless_unknown(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes is true, guarding on it; False where only the call tells the sizes."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def upper_bound(size: int | torch.SymInt) -> int | None:
    """Return the largest value of a size, None if it has none below 2^31."""
    if isinstance(size, int):
        return size
    from torch.utils._sympy.value_ranges import bound_sympy

    upper = bound_sympy(size.node.expr, size.node.shape_env.var_to_range).upper
    return int(upper) if upper.is_Integer and int(upper) < 1 << 31 else None


# ---- where dynamo and export found a node --------------------------------------------------------------------------


def module_ids(node: fx.Node) -> list[int]:
    """Return the `id`s of the modules around a node in dynamo's graph, innermost first; none in export's."""
    keys = reversed(node.meta.get("nn_module_stack") or {})
    ids = (str(key).partition("@")[0] for key in keys)  # "@1" and so on for further calls of one module
    return [int(key) for key in ids if key.isdecimal()]


def module_text(node: fx.Node) -> tuple[str, str]:
    """Return the path of the innermost module around a node, as it was reached when traced, and its class name.

    Dynamo writes the way as an expression in Python, such as `L['self']._modules['blocks'].0`. Hooks that replace
    `forward` make detours through closures and bound methods; these are taken out.
    """
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, cls = [*stack.values()][-1]
    return _plain_path(path), (cls if isinstance(cls, str) else cls.__name__).rpartition(".")[2]


def input_path(node: fx.Node) -> str:
    """Return the path of an input of dynamo's graph that a module holds, as `module_text` would write it."""
    source = getattr(node, "_dynamo_source", None)
    if node.op == "get_attr":  # freezing makes parameters attributes of the graph
        source = getattr(node.graph.owning_module, "_param_name_to_source", {}).get(node.target)
    name: Any = getattr(source, "name", "")  # a method in torch 2.11
    return _plain_path(str(name() if callable(name) else name))


def _plain_path(expression: str) -> str:
    """Return the dotted path in dynamo's expression, relative to the variable that it starts from."""
    path = re.sub(r"\['?(\w+)'?\]", r".\1", expression)
    path = re.sub(r"\.forward\b.*?\.__self__\b", "", path)
    path = re.sub(r"^[LG]\.\w+", "", path)
    return ".".join(part for part in path.split(".") if part not in ("", "__dict__", *_CONTAINERS))


_CONTAINERS = ("_modules", "_parameters", "_buffers")  # of nn.Module


def example_of(node: fx.Node) -> object:
    """Return the tensor that an input of dynamo's graph was traced with, None if it is not known."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    return getattr(node.meta.get("grapharg"), "example", None)


def is_held_by_module(node: fx.Node) -> bool:
    """Return whether an input of dynamo's graph is a buffer or any other tensor that a module of the model holds."""
    from torch._dynamo.source import is_from_unspecialized_nn_module_source

    source = getattr(node, "_dynamo_source", None)
    return source is not None and is_from_unspecialized_nn_module_source(source)


# ---- graphs for torch.compile --------------------------------------------------------------------------------------


def copy_of_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Copy dynamo's graph with all that compile_fx looks for; dynamo still reads its own after the backend returns."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    output = next(node for node in gm.graph.nodes if node.op == "output")
    graph.output(result).meta.update(output.meta)
    made = fx.GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id"):
        if hasattr(gm, name):
            setattr(made, name, copy.copy(getattr(gm, name)))
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    return made, copies


class FakeModes(NamedTuple):
    """Dynamo traces in one fake mode and lets backends compile in another, over the same symbols."""

    traced: FakeTensorMode
    compiled: FakeTensorMode

    @classmethod
    def of(cls, values: Sequence[object], example_inputs: Sequence[object]) -> FakeModes:
        """Return the modes of the values in a graph, and of what the backend is given."""
        traced = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        return cls(traced, fake_mode_of(example_inputs) or traced)


def mark_static_input(node: fx.Node, value: torch.Tensor) -> None:
    """Make a new input of dynamo's graph one of a fixed address: CUDA graphs take it where it is.

    Args:
        node: the input.
        value: fake, in the mode of the graph.
    """
    node._dynamo_source = None
    # "unguarded" has the effect of mark_static_address.
    node.meta = {"example_value": value, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


def backend_named(name: str) -> Callable[..., Any]:
    """Return a backend of torch.compile."""
    return torch._dynamo.lookup_backend(name)


def compile_with_inductor(
    gm: fx.GraphModule, inputs: list[Any], mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """Compile a graph as torch.compile(mode=, options=) does."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    compiled: Any = compile_fx(gm, inputs, config_patches=patches or None)
    return compiled  # type: ignore[no-any-return]


# ---- running modules -----------------------------------------------------------------------------------------------


def traced_call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call what a TorchFunctionMode is given while dynamo traces it; that stumbles over the `super()` of a method."""
    if function is torch.Tensor.unflatten:
        return args[0].unflatten(*args[1:], **kwargs)
    return function(*args, **kwargs)


def running_module() -> nn.Module | None:
    """Return the innermost module that Python is calling in this thread, None outside of all.

    Modules that dynamo has compiled into the frame of another are not seen.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _CALLS and frame.f_code.co_filename == _MODULE_FILE:
            module = frame.f_locals.get("self")
            return None if module is None else unwrapped(module)
        frame = frame.f_back
    return None


_CALLS = ("_wrapped_call_impl", "_call_impl")
_MODULE_FILE = nn.Module._call_impl.__code__.co_filename


def forget_compiled(kinds: Iterable[type[nn.Module]], backend: object) -> None:
    """Let dynamo forget the code that it compiled for classes of modules, and a backend.

    Other models of these classes compile again. Otherwise each backend would leave its graphs, and a model that is
    enabled anew would meet the limit of recompiles.
    """
    from torch._dynamo import eval_frame

    for kind in kinds:
        if isinstance(kind.forward, FunctionType):
            eval_frame.remove_from_cache(kind.forward.__code__)
    for key, known in [*eval_frame.cached_backends.items()]:
        if getattr(known, "compiler_fn", known) is backend:
            eval_frame.cached_backends.pop(key, None)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a function as it is also under torch.compile.

    As `torch.compiler.disable`, which takes seconds to import dynamo: here only who compiles pays for that.
    """
    disabled: list[Callable[..., Any]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # dynamo does not look into it
    run._torchdynamo_disable_msg = (  # type: ignore[attr-defined]  # and says so where it must
        "lite_attention runs this model, compiled or not, so it is part of no other graph; call "
        "lite_attention.disable(model) first to compile or export it as a part of one"
    )
    return run


def call_of(module: nn.Module) -> Callable[..., Any]:
    """Return what runs when a module is called, with its hooks: code that `module.compile()` made, or the module."""
    return override_of(module) or plain_call(module)


def plain_call(module: nn.Module) -> Callable[..., Any]:
    """Return what runs a module with its hooks, whatever was put in its place."""
    return module._call_impl


def override_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return what runs in place of a module when it is called, None if it runs itself."""
    return module._compiled_call_impl


def override(module: nn.Module, run: Callable[..., Any] | None) -> None:
    """Let something run in place of a module when it is called; None = the module itself.

    It is not a hook of the module, since an exception such as KeyboardInterrupt goes past these.
    """
    module._compiled_call_impl = run


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within what torch.compile returned, and any other model itself."""
    return getattr(model, WRAPPED, model)


WRAPPED = "_orig_mod"  # the attribute, and the part of the names of parameters


# ---- collectives that a compiler traces: `torch.distributed` wraps these -------------------------------------------


def all_to_all(x: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> torch.Tensor:
    """Begin to send so many rows of a contiguous tensor to each rank of a group; what comes is read after `arrived`."""
    begun: torch.Tensor = torch.ops._c10d_functional.all_to_all_single(x, [*received], [*sent], group)
    return begun


def all_gather(x: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """Begin to gather the rows of all ranks; what comes is read after `arrived`."""
    begun: torch.Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x, ranks, group)
    return begun


def arrived(x: torch.Tensor) -> torch.Tensor:
    """Return what a collective was begun for; the current stream waits for it."""
    done: torch.Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return done


def group_named(name: str) -> Any:
    """Return the process group that collectives find by a name, None if this process has none."""
    c10d: Any = torch.distributed.distributed_c10d
    try:
        return c10d._resolve_process_group(name)
    except (RuntimeError, LookupError):
        return None


def default_store() -> Any:
    """Return the store by which the processes of the default group found each other."""
    return torch.distributed.distributed_c10d._get_default_store()
