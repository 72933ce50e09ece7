"""What the pages say is true: their Python runs, their commands, files and links exist, and every
warning of the package is explained."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import EMULATED

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]

# A fenced block: its language, its text, and the comment right above that says why it isn't run.
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SCRIPT = re.compile(r"\b(?:python[\d.]*|bash|sh) ([\w./-]+\.(?:py|sh))|(?:^|\s)(\.ci/[\w-]+)")


@dataclass
class Block:
    language: str
    text: str
    line: int  # of its first line in the page
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["language"], m["text"], text.count("\n", 0, m.start("text")), m["reason"])
        for m in BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = prose(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {slug(heading) for heading in headings} | set(re.findall(r"^::: (\S+)$", text, re.M))


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder and settings of its own for what a page does."""
    monkeypatch.chdir(tmp_path)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.skipif(EMULATED, reason="the pages do not speak of the emulation")
@pytest.mark.filterwarnings("error:(MoE|moe_ext|TopKRouter)")  # no page shows what we warn of
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_runs(page, in_folder):
    """The blocks of a page in their order, in one namespace."""
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            # Empty lines before it, so that a traceback names the page's own line.
            code = compile("\n" * block.line + block.text, str(page), "exec")
            if block.reason is None:
                exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_exist(page):
    named = re.findall(r"`((?:csrc|moe_ext|tests|benchmarks|examples|docs)/[\w./-]+)`", prose(page))
    # X stands for a name that one chooses.
    assert not [path for path in named if "X" not in path and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "\n".join(block.text for block in blocks(page) if block.language == "bash")
    shell += "\n".join(re.findall(r"`([^`\n]+)`", prose(page)))
    missing = set(re.findall(r"\bmake ([a-z][\w-]*)", shell)) - targets
    scripts = {first or second for first, second in SCRIPT.findall(shell)}
    assert not missing and not [path for path in scripts if not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_resolve(page):
    broken = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_blocks_are_whole(page):
    """Every fence is read as a block, and each says its language."""
    found = blocks(page)
    assert page.read_text().count("\n```") == 2 * len(found)
    assert all(block.language for block in found)


def messages_of(path: Path) -> list[str]:
    """Of every warning, and every error that no caller expects, in a file: the longest sentence
    that is fixed, or part of one."""
    sentences = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        if name in ("warn", "warn_once", "SystemExit", "ImportError"):
            parts = [
                part.value
                for part in ast.walk(node.args[-1])
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            sentences += sorted((s for part in parts for s in part.split(". ")), key=len)[-1:]
    return sentences


def test_every_warning_is_explained():
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    sources = [*ROOT.glob("moe_ext/**/*.py"), ROOT / "setup.py", ROOT / "build_backend.py"]
    found = [text for path in sorted(sources) for text in messages_of(path)]
    assert len(found) >= 20
    assert not [text for text in found if " ".join(text.split()) not in page]
