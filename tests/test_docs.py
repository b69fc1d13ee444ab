"""The documentation runs, its links lead somewhere, and the sources keep to the style's limits."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from xml.etree import ElementTree

import pytest

import mpq_fx
from mpq_fx import errors
from mpq_fx.config import Config
from mpq_fx.facts import Plan
from mpq_fx.formats import BUILT_IN
from mpq_fx.passes import METRICS, TARGETS
from mpq_fx.passes.allocate import SEARCHES, SOLVERS
from mpq_fx.passes.lower.triton_device import DEVICES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(
    path
    for folder in ("mpq_fx", "passes", "kernels", "tests", "bench")
    for path in (ROOT / folder).rglob("*.py")
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)")
NOT_EXECUTED = re.compile(r"<!-- not executed: (?P<reason>.+?) -->")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")

FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 40, 80

# "path" or "path::function" -> why it may be longer.  An entry that is not needed fails a test.
LONGER: dict[str, str] = {}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines with their numbers, and why it is not run."""

    page: Path
    language: str
    first: int
    lines: tuple[str, ...]
    reason: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, in order."""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        if not (fence := FENCE.match(lines[number])):
            number += 1
            continue
        end = number + 1
        while lines[end].strip() != "```":
            end += 1
        body = tuple(line.removeprefix(fence["indent"]) for line in lines[number + 1 : end])
        yield Block(page, fence["language"], number + 1, body, reason_above(lines, number))
        number = end + 1


def reason_above(lines: list[str], number: int) -> str | None:
    """The reason of a `not executed` comment right above line `number`, blank lines apart."""
    above = next((line for line in reversed(lines[:number]) if line.strip()), "")
    comment = NOT_EXECUTED.search(above)
    return comment and comment["reason"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON = [block for page in PAGES for block in blocks_of(page) if block.language == "python"]
RUN = [block for block in PYTHON if not block.reason]
SKIPPED = [block for block in PYTHON if block.reason]


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}), ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path, pytestconfig):
    """One namespace per page, line numbers as in the page, its own process, the same warnings."""
    script = [""] * len(page.read_text().splitlines())
    for block in (block for block in RUN if block.page == page):
        script[block.first : block.first + len(block.lines)] = block.lines
    path = tmp_path / f"{page.stem}.py"
    path.write_text("\n".join(script))
    filters = [f"-W{each}" for each in pytestconfig.getini("filterwarnings")]
    command = [sys.executable, *filters, path.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name_of(page)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("block", SKIPPED, ids=lambda block: f"{name_of(block.page)}:{block.first}")
def test_a_block_that_is_not_executed_still_parses(block):
    ast.parse("\n".join(block.lines))
    pytest.skip(block.reason)


def test_the_first_page_has_code_that_runs():
    assert ROOT / "README.md" in {block.page for block in RUN}


def prose_of(page: Path) -> str:
    """A page without its fenced blocks and inline code, where brackets mean something else."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors_of(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    broken = []
    for link in LINK.finditer(prose_of(page)):
        target, _, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.append(link["target"])
    assert not broken


def test_the_page_of_options_lists_every_field_with_its_default():
    text = (ROOT / "docs" / "options.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", text, flags=re.MULTILINE)
    listed = {name: ast.literal_eval(default) for name, default, _ in rows}
    assert listed == {field.name: field.default for field in fields(Config)}
    assert [*listed] == [field.name for field in fields(Config)], "in the order of the fields"


def test_the_page_of_options_names_all_that_an_option_or_an_error_can_be():
    text = (ROOT / "docs" / "options.md").read_text()
    kinds = [name for name in vars(errors) if name.endswith("Error")]
    choices = (METRICS, SEARCHES, SOLVERS, BUILT_IN, DEVICES, [t.name for t in TARGETS], kinds)
    names = {name for each in choices for name in each}
    assert not {name for name in names if f'`"{name}"`' not in text and f"`{name}`" not in text}


def test_every_public_name_is_on_a_page():
    text = "\n".join(page.read_text() for page in PAGES)
    assert not {name for name in mpq_fx.__all__ if f"mpq_fx.{name}" not in text}


def test_the_page_of_the_plan_file_describes_every_field():
    text = (ROOT / "docs" / "plan_file.md").read_text()
    table = text.partition("## Fields")[2].partition("A choice is spelled")[0]
    firsts = re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE)
    named = {name for first in firsts for name in re.findall(r"`(\w+)`", first)}
    assert named == {"mpq_fx_plan", *(field.name for field in fields(Plan))}


def test_the_picture_of_the_data_flow_is_a_picture():
    root = ElementTree.parse(ROOT / "docs" / "data_flow.svg").getroot()
    words = {text.strip() for node in root.iter() for text in (node.text or "",)}
    stages = {"capture", "canonicalize", "observe", "propose", "measure", "allocate", "rewrite"}
    assert stages <= words


def too_long() -> dict[str, int]:
    """ "path" or "path::function" -> its number of lines, for everything above its limit."""
    found = {}
    for path in SOURCES:
        text = path.read_text()
        limit = KERNEL_LINES if path.is_relative_to(ROOT / "kernels") else FUNCTION_LINES
        if (lines := len(text.splitlines())) > FILE_LINES:
            found[name_of(path)] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > limit:
                    found[f"{name_of(path)}::{node.name}"] = length
    return found


def test_files_and_functions_keep_to_their_limits():
    longer = {name: lines for name, lines in too_long().items() if name not in LONGER}
    assert not longer, "shorten these; the limits are in CONTRIBUTING.md"


def test_no_exception_from_the_limits_is_stale():
    assert not LONGER.keys() - too_long().keys()
