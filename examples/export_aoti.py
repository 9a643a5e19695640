"""A program of torch.export that skips, compiled ahead of time into one file.

python examples/export_aoti.py --output denoiser.pt2
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import lite_attention

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="denoiser.pt2")
args = parser.parse_args()


class Denoiser(nn.Module):
    """One layer of self-attention, 4 heads of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(256, 768), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the noise in x."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
latent = torch.randn(1, 1024, 256, device=device, dtype=dtype)
with torch.no_grad():
    exported = torch.export.export(Denoiser().to(device, dtype).eval(), (latent,))
    program = lite_attention.make_skip_aware(exported, threshold=-6.0, num_steps=20)  # 20 steps, then fresh
    print([f"{site.name}: {site.reason or 'skips'}" for site in program.sites])
    torch._inductor.aoti_compile_and_package(program, package_path=args.output)
    run = torch._inductor.aoti_load_package(args.output)  # elsewhere: import lite_attention first
    for _ in range(20):
        latent = latent - 0.05 * run(latent)
