"""LTX-Video by votes: thresholds that grow over the steps, and tiles that are blocks of the video.

python examples/ltx.py --prompt "a red fox in the snow"
"""

import argparse

import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

import lite_attention
from lite_attention import schedules

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", default="a red fox in the snow")
parser.add_argument("--model", default="Lightricks/LTX-Video", help="name on the hub, or a folder")
parser.add_argument("--size", type=int, nargs=3, default=[161, 512, 704], help="frames, height, width")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--output", default="ltx.mp4")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = LTXPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
growing = schedules.three_segments(args.steps, early=-8.0, middle=-6.0, late=-4.0)
lite_attention.enable(pipe, threshold=growing, num_steps=args.steps, token_order="tile3d")

frames, height, width = args.size
video = pipe(
    args.prompt, num_frames=frames, height=height, width=width, num_inference_steps=args.steps,
    generator=torch.Generator(device).manual_seed(0),
).frames[0]  # fmt: skip
export_to_video(video, args.output, fps=24)
lite_attention.report(pipe)
