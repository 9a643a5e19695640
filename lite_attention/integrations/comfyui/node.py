"""The node "LiteAttention", and the extension that brings it. Imports ComfyUI."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .options import CHOICES, DEFAULTS, NodeOptions
from .patch import Patch

__all__ = ["LiteAttentionExtension", "LiteAttentionNode"]


class LiteAttentionNode(io.ComfyNode):  # type: ignore[misc]
    """Patches a model to skip attention that does not matter."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the inputs and outputs."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return io.Schema(
            node_id="LiteAttention",
            display_name="LiteAttention",
            category="model/patch",
            description="Computes a share of the attention of long sequences, and adds what the rest gave in steps "
            "that compute all of it. Calls that it does not apply to run as without it.",
            inputs=[
                io.Model.Input("model", tooltip="The model to patch."),
                io.Combo.Input(
                    "preset", options=CHOICES, default=DEFAULTS["preset"],
                    tooltip="How much is computed. fast is fastest, quality is nearest to dense attention. votes is "
                    "a method that takes hardly any memory and runs on more GPUs, but is farther from dense.",
                ),
                io.Float.Input(
                    "threshold", default=DEFAULTS["threshold"], min=-40.0, max=0.0, step=0.5,
                    tooltip="Of votes alone: what lies so far below the largest score, in powers of 2, is skipped. "
                    "-10 is careful, -3 is bold.",
                ),
                io.Float.Input(
                    "start_percent", default=DEFAULTS["start_percent"], **percent,
                    tooltip="Attention is dense before this point of the sampling. The presets compute everything in "
                    "the first two steps after it.",
                ),
                io.Float.Input(
                    "end_percent", default=DEFAULTS["end_percent"], **percent,
                    tooltip="Attention is dense after this point of the sampling.",
                ),
                io.String.Input(
                    "dense_blocks", default=DEFAULTS["dense_blocks"],
                    tooltip="Blocks whose attention is always dense, such as '0, 1, 47-49'. Where a model does not "
                    "number its blocks, its attention calls count.",
                ),
                io.String.Input(
                    "exact_tokens", default=DEFAULTS["exact_tokens"],
                    tooltip="Tokens that are never skipped, and whose own attention skips nothing: text, audio, "
                    "references. 'auto' is what the model tells of them. Or slices of the sequence: '0:256' its "
                    "first 256 tokens, '-512:' its last 512. Several with commas between; empty is none.",
                ),
                io.Int.Input(
                    "min_tokens", default=DEFAULTS["min_tokens"], min=0, max=1 << 20, step=512,
                    tooltip="Shorter sequences are dense.",
                ),
                io.Combo.Input(
                    "memory", options=["device", "host"], default=DEFAULTS["memory"],
                    tooltip="Where what skipped attention gave is kept: on the GPU, or in pinned memory of the host.",
                ),
                io.Boolean.Input(
                    "verbose", default=DEFAULTS["verbose"], tooltip="Log why attention is dense where it is."
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, **inputs: Any) -> Any:
        """Return the patched model.

        Raises:
            ValueError: an input out of range.
        """
        return io.NodeOutput(Patch(NodeOptions(**inputs)).put_on(model))


class LiteAttentionExtension(ComfyExtension):  # type: ignore[misc]
    """The node pack."""

    async def get_node_list(self) -> list[Any]:
        """Return its nodes."""
        return [LiteAttentionNode]
