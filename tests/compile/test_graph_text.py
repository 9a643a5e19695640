"""What the backend hands to the inner compiler, as text: our own inputs and ops, whose names are ours to choose.

The rest is shown by dtype and shape, since its names change with PyTorch. After a change on purpose:
`EXPECTTEST_ACCEPT=1 pytest tests/compile/test_graph_text.py`.
"""

from __future__ import annotations

import operator
import textwrap
from typing import Any

import torch
from expecttest import TestCase
from torch import fx, nn
from torch.utils._dtype_abbrs import dtype_abbrs

from tests.support.toys import Attention, Inner, Toy, context, tokens, toy_backend

_STATE = ("skip_mask", "control", "threshold", "initial_mask")


def our_part(gm: fx.GraphModule) -> str:
    """Return the states' placeholders, and the calls of operator overloads: dynamo's own graphs hold none."""

    def shown(node: fx.Node) -> str:
        if isinstance(node.target, torch._ops.OpOverload) or node.name.rpartition("_")[0] in _STATE:
            return node.name
        if node.target is operator.getitem and isinstance(node.args[0].target, torch._ops.OpOverload):
            return f"{node.args[0].name}[{node.args[1]}]"
        return typed(node)

    def typed(node: fx.Node) -> str:
        value = node.meta["example_value"]
        return f"{dtype_abbrs[value.dtype]}{list(value.shape)}"

    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder" and shown(node) == node.name:
            lines.append(f"{node.name}: {typed(node)}")
        elif isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), shown)
            arguments = ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())])
            lines.append(f"{node.name} = {node.target}({arguments})")
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)


class TestGraphText(TestCase):
    maxDiff = None

    def compiled(self, model: nn.Module, *args: torch.Tensor, options: Any = None, **kwargs: torch.Tensor) -> str:
        inner = Inner()
        backend = toy_backend(inner, num_steps=8, **(options or {}))
        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
        (gm,) = inner.graphs
        return our_part(gm)

    def test_block(self) -> None:
        self.assertExpectedInline(
            self.compiled(Toy(1), tokens(0), context()),
            """\
skip_mask_0: i32[2, 1, 2, 6, 1]
control_0: i32[24]
threshold_0: f32[2, 8, 2]
permute_default = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
permute_default_1 = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
permute_default_2 = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
skip_attention_default = lite_attention.skip_attention.default(permute_default, permute_default_1,
    permute_default_2, skip_mask_0, control_0, threshold_0, None, None, None, scale=None, tile_m=16,
    tile_n=16, quantization=none)
permute_default_3 = aten.permute.default(skip_attention_default[0], [0, 2, 1, 3])""",
        )

    def test_key_mask_and_initial_mask(self) -> None:
        mask = torch.ones(1, 1, 1, 96, dtype=torch.bool)
        options = {"initial_mask": lambda site: None, "implementation": "reference"}
        self.assertExpectedInline(
            self.compiled(Attention(), tokens(0), attn_mask=mask, options=options),
            """\
skip_mask_0: i32[2, 1, 2, 6, 1]
control_0: i32[24]
threshold_0: f32[2, 8, 2]
initial_mask_0: i32[1, 2, 6, 1]
permute_default = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
permute_default_1 = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
permute_default_2 = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
select_int = aten.select.int(b8[1, 1, 1, 96], 1, 0)
select_int_1 = aten.select.int(select_int, 1, 0)
skip_attention_reference_default = lite_attention.skip_attention_reference.default(permute_default,
    permute_default_1, permute_default_2, skip_mask_0, control_0, threshold_0, initial_mask_0, None,
    select_int_1, scale=None, tile_m=16, tile_n=16, quantization=none)
permute_default_3 = aten.permute.default(skip_attention_reference_default[0], [0, 2, 1, 3])""",
        )

    def test_dense_kernel(self) -> None:
        mask = torch.ones(1, 1, 1, 96, dtype=torch.bool)
        options = {"dense": "kernel", "min_tiles": 7}
        self.assertExpectedInline(
            self.compiled(Attention(), tokens(0), attn_mask=mask, options=options),
            """\
permute_default = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
permute_default_1 = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
permute_default_2 = aten.permute.default(f32[1, 2, 96, 16], [0, 2, 1, 3])
select_int = aten.select.int(b8[1, 1, 1, 96], 1, 0)
select_int_1 = aten.select.int(select_int, 1, 0)
attention_default = lite_attention.attention.default(permute_default, permute_default_1, permute_default_2,
    select_int_1, scale=None)
permute_default_3 = aten.permute.default(attention_default[0], [0, 2, 1, 3])""",
        )

    def test_attention_written_by_hand(self) -> None:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5).float().softmax(-1)
            return torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).transpose(1, 2).type_as(q)

        model = Attention().to(torch.bfloat16)
        model.attend = attend
        self.assertExpectedInline(
            self.compiled(model, tokens(0).bfloat16()),
            """\
skip_mask_0: i32[2, 1, 2, 6, 1]
control_0: i32[24]
threshold_0: f32[2, 8, 2]
to_dtype = aten.to.dtype(bf16[1, 96, 2, 16], torch.float32)
permute_default = aten.permute.default(to_dtype, [0, 1, 2, 3])
to_dtype_1 = aten.to.dtype(bf16[1, 96, 2, 16], torch.float32)
permute_default_1 = aten.permute.default(to_dtype_1, [0, 1, 2, 3])
permute_default_2 = aten.permute.default(f32[1, 96, 2, 16], [0, 1, 2, 3])
skip_attention_default = lite_attention.skip_attention.default(permute_default, permute_default_1,
    permute_default_2, skip_mask_0, control_0, threshold_0, None, None, None, scale=0.5, tile_m=16, tile_n=16,
    quantization=none)
permute_default_3 = aten.permute.default(skip_attention_default[0], [0, 1, 2, 3])""",
        )
