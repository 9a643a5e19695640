"""The pages that are made from the code say what it does now, and the site names all that there is."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lite_attention import ResidualState, presets
from tools import pays
from tools.pages import DOCS, PAGES
from tools.reasons import MEANINGS, reasons

CHECKOUT = Path(__file__).parents[2]
ROOMS = ("lite_attention", "ops", "compile", "cute_kernels", "tests")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name: str) -> None:
    """Otherwise: python -m tools.pages."""
    assert PAGES[name]() == (DOCS / name).read_text()


def test_all_pages_are_in_the_navigation() -> None:
    config = yaml.safe_load((CHECKOUT / "mkdocs.yml").read_text())
    named = re.findall(r"[\w/-]+\.md", str(config["nav"]))
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_environment_variables_are_all_there() -> None:
    sources = [file.read_text() for room in ROOMS for file in (CHECKOUT / room).rglob("*.py")]
    used = {name for text in sources for name in re.findall(r'"(LITE_ATTENTION_[A-Z_]+)"', text)}
    page = (DOCS / "reference/environment.md").read_text()
    assert {*re.findall(r"`(LITE_ATTENTION_[A-Z_]+)`", page)} == used


def test_every_reason_has_its_advice() -> None:
    found = reasons()
    assert {*found} == {*MEANINGS}
    assert len(found) == len({*found}) > 20


# ---- does it pay? ----------------------------------------------------------------------------------------------------


def test_what_was_measured_comes_out_again() -> None:
    """Two layers, one forward of Wan 14B at 32,760 tokens."""
    forward = pays.MODELS[0]._replace(layers=2, steps=1, passes=1)
    assert 1e3 * pays.seconds(forward) == pytest.approx(143.0)
    assert 1e3 * pays.seconds(forward, "balanced") == pytest.approx(132.5)  # one step: it is full, and decides
    assert pays.attention_share(forward) == pytest.approx((143.0 - 64.6) / 143.0)


def test_estimates_grow_with_the_tokens() -> None:
    short = pays.MODELS[0]
    long = short._replace(tokens=2 * short.tokens)
    attention = pays.seconds(short) * pays.attention_share(short)
    assert pays.seconds(long) == pytest.approx(2 * (pays.seconds(short) - attention) + 4 * attention)


def test_a_preset_takes_what_its_steps_take() -> None:
    """Balanced, 9 steps: 0, 1, 3 and 6 are full, of which the first and the third decide."""
    forward = pays.MODELS[0]._replace(layers=2, steps=9, passes=1)
    assert 1e3 * pays.seconds(forward, "balanced") == pytest.approx(2 * 132.5 + 2 * 125.9 + 5 * 85.9)


def test_the_memory_of_a_preset_is_that_of_its_states() -> None:
    sizes: dict[str, Any] = {"batch": 1, "heads": 3, "seq_q": 960, "seq_k": 960, "tile_m": 192, "tile_n": 80}
    told = ResidualState.nbytes_of(**sizes, value_dim=64, slots=1, forecast=True, residual_dtype="fp8")
    model = pays.MODELS[0]._replace(layers=1, tokens=960, heads=3, head_dim=64)
    assert pays.memory(model) == told.residual + told.scale


def test_the_readme_has_the_figures_of_the_pages() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    (row,) = [row for row in pays.page().splitlines() if row.startswith("| Wan 14B | 720 x 1280, 81 frames |")]
    dense, balanced = (re.sub(r" \(.*", "", row.split(" | ")[column]) for column in (5, 7))
    assert f"{balanced} s with `balanced`, in place of {dense} s" in readme
    models = len(re.findall(r"^\| `", (DOCS / "reference/models.md").read_text(), re.MULTILINE))
    assert f"each of {models} transformers" in readme


PSNR_OF = {
    "`quality`": "residual:0.5,2",
    "`balanced`": "residual:0.3,3",
    "`fast`": "residual:0.2,3",
    "`balanced`, tokens in blocks": "residual:0.3,3,tile3d",
    "`quality`, INT8 and FP8": "residual-fp8:0.5,2",
    "`fast`, INT8 and FP8": "residual-fp8:0.2,3",
    "`fast`, INT8 scores, FP8 values": "residual-fp8:0.2,3",
    "fewer steps: 12 of 20": "steps:12",
    "votes, threshold -2": "threshold:-2",
    "Sol-Attn, for comparison": "sol:1,4",
    "Sol-Attn, tau 1, first 4 steps dense": "sol:1,4",
}


def test_short_tables_have_the_means_of_the_long_one() -> None:
    with (DOCS / "data/quality.csv").open() as file:
        mean = {row["method"]: row["psnr"] for row in csv.DictReader(file) if row["run"] == "euler-20"}
    many_steps = (presets.__doc__ or "").split("In a generation of at most")[0]
    texts = [(CHECKOUT / "README.md").read_text(), (DOCS / "results.md").read_text()]
    texts += [(DOCS / "how-to/presets.md").read_text(), re.sub(r"^\| (\w+)", r"| `\1`", many_steps, flags=re.M)]
    for text, least in zip(texts, (4, 9, 3, 3), strict=True):
        rows = re.findall(r"^\| (?:preset )?(.+?) \|.*?\| ([\d.]+) dB \|", text, re.MULTILINE)
        said = [(PSNR_OF[name], psnr) for name, psnr in rows if name in PSNR_OF]
        assert len(said) >= least
        assert [(name, psnr) for name, psnr in said if psnr != mean[name]] == []


def _times_of_presets(kept: int) -> tuple[float, float]:
    """Return time over FlashAttention-3 in bf16, and with INT8 and FP8: the mean of 20 steps, every third full."""
    plans = (DOCS / "performance.md").read_text().split(f"| 20 steps, {kept} % kept, every second full |")[1]
    cells = re.search(r"\| every third \|(.*)", plans)[1].split("|")  # type: ignore[index]
    return float(cells[1]), float(cells[3])


def test_times_of_presets_are_those_that_were_measured() -> None:
    balanced, fast = _times_of_presets(30), _times_of_presets(20)
    readme, results = (CHECKOUT / "README.md").read_text(), (DOCS / "results.md").read_text()
    assert f"| preset `balanced` | 58 % | {balanced[0]:.2f} |" in readme
    assert f"| preset `fast` | 52 % | {fast[0]:.2f} |" in readme
    assert f"| `fast`, INT8 scores, FP8 values | 52 % | {fast[1]:.2f} |" in readme
    assert re.search(rf"\| 1, 40, 75,600, 128 \| bf16 \| [\d.]+ \| {balanced[0]:.2f} \| {fast[0]:.2f} \|", results)
