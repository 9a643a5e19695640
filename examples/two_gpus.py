"""Wan on several GPUs: diffusers shares the tokens, each process skips by what its heads learn.

torchrun --nproc-per-node 2 examples/two_gpus.py --prompt "a red fox in the snow"
"""

import argparse

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanPipeline
from diffusers.utils import export_to_video

import lite_attention

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", default="a red fox in the snow")
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-14B-Diffusers", help="name on the hub, or a folder")
parser.add_argument("--size", type=int, nargs=3, default=[81, 720, 1280], help="frames, height, width")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--output", default="wan.mp4")
args = parser.parse_args()

has_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if has_gpu else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank % torch.cuda.device_count()) if has_gpu else torch.device("cpu")
if has_gpu:
    torch.cuda.set_device(device)
pipe = WanPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
lite_attention.enable(pipe, preset="balanced")

frames, height, width = args.size
video = pipe(
    args.prompt, num_frames=frames, height=height, width=width, num_inference_steps=args.steps,
    generator=torch.Generator(device).manual_seed(0),
).frames[0]  # fmt: skip
if rank == 0:
    export_to_video(video, args.output, fps=16)
lite_attention.report(pipe, process_group=dist.group.WORLD)  # of all processes; the first one prints
dist.destroy_process_group()
