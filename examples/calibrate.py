"""Thresholds for your model: found on some prompts, verified on others, saved, and used.

python examples/calibrate.py --sparsity 0.4 --output thresholds.toml
"""

import argparse

import torch
from diffusers import WanPipeline

import lite_attention

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="name on the hub, or a folder")
parser.add_argument("--size", type=int, nargs=3, default=[81, 480, 832], help="frames, height, width")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--sparsity", type=float, default=0.4, help="share of all tiles to leave out")
parser.add_argument("--output", default="thresholds.toml")
args = parser.parse_args()

PROMPTS = ["a red fox in the snow", "a tram in the rain", "a chef cuts an onion"]
frames, height, width = args.size
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = WanPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)


def generate(number: int) -> torch.Tensor:
    """Return the latents of a prompt; everything random is seeded."""
    return pipe(
        PROMPTS[number], num_frames=frames, height=height, width=width, num_inference_steps=args.steps,
        generator=torch.Generator(device).manual_seed(number), output_type="latent",
    ).frames  # fmt: skip


found = lite_attention.calibrate(
    pipe, generate, num_steps=args.steps, target_sparsity=args.sparsity, prompts=[0, 1], held_out=[2],
    autosave="calibration.pt",
)  # fmt: skip
print(found)
found.save(args.output)
lite_attention.enable(pipe, num_steps=args.steps, threshold=args.output)
