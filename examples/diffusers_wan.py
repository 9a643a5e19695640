"""Wan in diffusers with the preset "balanced": a video, and a report of what was skipped.

python examples/diffusers_wan.py --prompt "a red fox in the snow"
"""

import argparse

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import lite_attention

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", default="a red fox in the snow")
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="name on the hub, or a folder")
parser.add_argument("--size", type=int, nargs=3, default=[81, 480, 832], help="frames, height, width")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--preset", default="balanced", choices=["quality", "balanced", "fast"])
parser.add_argument("--output", default="wan.mp4")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = WanPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
lite_attention.enable(pipe, preset=args.preset)

frames, height, width = args.size
video = pipe(
    args.prompt, num_frames=frames, height=height, width=width, num_inference_steps=args.steps,
    generator=torch.Generator(device).manual_seed(0),
).frames[0]  # fmt: skip
export_to_video(video, args.output, fps=16)
lite_attention.report(pipe)
