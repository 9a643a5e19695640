"""The pages name what is there: files, folders, modules of ours and what they hold, and what links point to."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGES = [
    CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/moving_shapes/README.md")
]
PAGES += sorted((CHECKOUT / "docs").rglob("*.md"))
ROOMS = ["lite_attention", "ops", "compile", "cute_kernels", "tests", "benchmarks", "examples", "docs"]
FILES = [file.as_posix() for room in ROOMS for file in (CHECKOUT / room).rglob("*") if file.is_file()]

CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
PATH = re.compile(
    rf"(?<![\w./-])(?:(?:[\w-]+/)*[\w-]+\.(?:py|c|md|toml|png|pt|jsonl|safetensors)|(?:{'|'.join(ROOMS)})/[\w/]*)(?![\w.])"
)
MODULE = re.compile(r"(?<![\w./])(?:lite_attention|benchmarks|examples|tests)(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\((?!http)([^)#]+)")

MADE_BY_COMMANDS = re.compile(
    r"build/|program\.py|FILE\.png|(thresholds|registry|shares|calibration|sparsity|maps|bench|weights|checkpoint)\.(png|toml|pt)"
)
YET_TO_COME = re.compile(r"`[^`\n]+` \(new\)|\S*(NAME|XX)\S*")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))


def _in_code(page: Path, pattern: re.Pattern[str]) -> set[str]:
    text = YET_TO_COME.sub("", page.read_text())
    return {match[0] for code in CODE.finditer(text) for match in pattern.finditer(code[0])}


def _is_there(path: str, page: Path) -> bool:
    """Whether a path is there, from the root or the page, or, as `cache.py`, in the room that the page speaks of."""
    return any((folder / path).exists() for folder in (CHECKOUT, page.parent)) or any(
        file.endswith(f"/{path}") for file in FILES
    )


def _resolves(name: str) -> bool:
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    try:
        for attribute in rest:
            module = f"{module}.{attribute}"
            found = getattr(found, attribute, None) or importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


@each_page
def test_files_and_folders_are_there(page: Path) -> None:
    paths = {path for path in _in_code(page, PATH) if not MADE_BY_COMMANDS.match(path)}
    assert [path for path in sorted(paths) if not _is_there(path, page)] == []


@each_page
def test_modules_and_what_they_hold_are_there(page: Path) -> None:
    assert [name for name in sorted(_in_code(page, MODULE)) if not _resolves(name)] == []


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


COMMAND = re.compile(r"python -m ((?:lite_attention|benchmarks|examples|tools)[\w.]*)((?:[^`\n]|\\\n)*)")


@each_page
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    """A command that prints a figure must be one that runs."""
    unknown = []
    for module, rest in COMMAND.findall(page.read_text()):
        if module == "lite_attention":
            known = " ".join(file.read_text() for file in (CHECKOUT / "lite_attention/cli").glob("*.py"))
        else:
            path = CHECKOUT / module.replace(".", "/")
            known = " ".join(file.read_text() for file in path.parent.glob("*.py"))
        flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)
        unknown += [f"{module} {flag}" for flag in flags if f'"{flag}"' not in known and flag != "--help"]
    assert unknown == []


# ---- pages are easy to read ------------------------------------------------------------------------------------------


def _sentences(page: Path) -> list[str]:
    text = re.sub(r"```.*?```|^\|.*?$|^#.*?$", "\n\n", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:\*|\d+\.|-) )", text)
    return [sentence for part in paragraphs for sentence in re.split(r"(?<=[.:;?])[*_)]*\s+", part.strip())]


def test_lines_of_the_readme_fit_a_screen() -> None:
    lines = (CHECKOUT / "README.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 100] == []


@each_page
def test_sentences_are_short(page: Path) -> None:
    assert [sentence for sentence in _sentences(page) if len(sentence.split()) > 30] == []


def test_a_long_sentence_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Short, and `code of words`.\n\n* A [link](x.md) that goes on " + "and on " * 13 + "here.\n* Short.\n"
    )
    assert [len(sentence.split()) for sentence in _sentences(page)] == [3, 33, 2]
