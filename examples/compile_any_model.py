"""Any model, by torch.compile: attention is found in the graph, and the model's code stays as it is."""

import torch
import torch.nn.functional as F
from torch import nn

import lite_attention


class Block(nn.Module):
    """Self-attention of 4 heads, as any transformer writes it."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x and what attention adds to it."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
model = nn.Sequential(*(Block() for _ in range(4))).to(device, dtype).eval()
compiled = torch.compile(model, backend=lite_attention.liteattn_backend)

latent = torch.randn(1, 1024, 256, device=device, dtype=dtype)
with torch.no_grad():
    for step in range(10):
        for name in ("cond", "uncond"):
            with lite_attention.branch(name, step=step):  # each branch has a memory of its own
                noise = compiled(latent)
        latent = latent - 0.1 * noise
print([f"{site.name}: {site.reason or 'skips'}" for site in lite_attention.liteattn_backend.sites])
