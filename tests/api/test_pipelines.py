"""Whole pipelines of diffusers, of tiny random parts: enabled, and skipping nothing, they make what they made dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

import lite_attention
from tests.support import pipelines
from tests.support.diffusers_models import TILE, silent_report

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("build", pipelines.BUILDERS, ids=lambda build: build.__name__)
def test_as_dense_where_nothing_is_skipped(build: Callable[[], Any]) -> None:
    pipe = build()
    dense = pipelines.generate(pipe)
    lite_attention.enable(pipe, compile=False, threshold=-math.inf, tile_shape=TILE)
    torch.testing.assert_close(pipelines.generate(pipe), dense, rtol=1e-5, atol=1e-5)
    assert not any(_skipped(pipe))

    lite_attention.set_threshold(pipe, -1.0)  # and that something could have been
    assert (pipelines.generate(pipe) - dense).abs().max() > 1e-3
    assert any(_skipped(pipe))


def _skipped(pipe: Any) -> list[float]:
    """Return the largest share of each site that has run."""
    shares = [max(row.sparsity) for row in silent_report(pipe).swapped if row.state is not None]
    assert shares
    return shares


def test_video_to_video_from_a_video() -> None:
    pipe = pipelines.wan_video_to_video()
    options = {"video": torch.rand(1, 5, 3, 32, 16), "latents": None, "strength": 0.5}
    dense = pipelines.generate(pipe, **options)
    lite_attention.enable(pipe, compile=False, threshold=-math.inf, tile_shape=TILE)
    torch.testing.assert_close(pipelines.generate(pipe, **options), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [pipelines.wan, pipelines.ltx], ids=lambda build: build.__name__)
def test_frames_come_out_of_the_decoder(build: Callable[[], Any]) -> None:
    pipe = build()
    lite_attention.enable(pipe, compile=False, threshold=-4.0, tile_shape=TILE)
    call = pipelines.CALLS[type(pipe)](0)
    video = pipe(**call, num_inference_steps=2, max_sequence_length=pipelines.TEXT, output_type="pt").frames
    assert video.shape == (1, call["num_frames"], 3, call["height"], call["width"])
    assert video.isfinite().all()


# ---- what the `diffusers` extra brings -------------------------------------------------------------------------------


def test_a_tokenizer_of_a_sentencepiece_file_as_ltx_has(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n".join(f"a fox in snow {i} jumps over lazy dogs" for i in range(99)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=40, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    pipe = pipelines.ltx()
    pipe.register_modules(tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    lite_attention.enable(pipe, compile=False, threshold=-4.0, tile_shape=TILE)
    one, other = (pipelines.generate(pipe, prompt=prompt) for prompt in ("a fox", "lazy dogs"))
    assert (one - other).abs().max() > 1e-4


def test_wan_cleans_prompts_up() -> None:
    broken = "a caf\u00c3\u00a9"  # UTF-8 that was read as Latin-1
    assert ftfy.fix_text(broken) == "a caf\u00e9"
    pipe = pipelines.wan()
    one, other = (pipelines.generate(pipe, prompt=prompt) for prompt in (broken, "a caf\u00e9"))
    assert torch.equal(one, other)
