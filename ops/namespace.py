"""Where the ops live in `torch.ops`, and where modules are that are named in strings.

Both are parameters, so that a copy of these sources under another name can be loaded beside them: `torch.ops` has one
of each name in a process. `integrations/hub` makes such copies.
"""

from __future__ import annotations

__all__ = ["KERNELS", "NAMESPACE"]

NAMESPACE = "lite_attention"
KERNELS = f"{__name__.rpartition('.ops.')[0]}.cute_kernels"  # the package of kernels beside this one
