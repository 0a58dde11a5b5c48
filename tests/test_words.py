"""Plain words: few sentences begin with Of, What, Where, Who or Else.

A sentence that begins so puts its subject last. Docstrings of the code and the pages of docs/ are
read; docs/evidence is not. A question may begin so, and so may a heading.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
AVOIDED = re.compile(r"(of|what|where|who|else)\b", re.IGNORECASE)
MOST = 0.01  # share of the sentences
CODE = [
    path
    for folder in ("mmrjax", "data_builders", "configs", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "data_builders").glob("*/README.md")),
]
SECTION = re.compile(r"(Args|Returns|Yields|Raises|Attributes|Fields|Example|Examples):")
ENTRY = re.compile(r"(\*{0,2}[`\w][\w`*.,/ \[\]]{0,40}?(?: \([^)]*\))?): +(?=\S)")
ABBREVIATED = re.compile(r"\b(e\.g|i\.e|cf|vs|al|Fig|Eq|Sec|No|approx|resp)\.$")
Sentence = tuple[int, str]  # line in its block, counted from 0, and text on one line


def blocks(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Paragraphs and list items as (first line, text); fences, tables, headings are left out."""
    start, block, fenced = 0, [], False
    for number, line in enumerate([*lines, ""]):
        text = line.strip()
        fence = text.startswith("```")
        if fence:
            fenced = not fenced
        skipped = fence or fenced or text.startswith(("|", "#", ">>>", "<!--"))
        ends = skipped or not text or SECTION.fullmatch(text)
        if block and (ends or re.match(r"(?:[-*]|\d+\.) ", text)):
            yield start, "\n".join(block)
            block = []
        if not ends:
            start = start if block else number
            block.append(re.sub(r"^(?:[-*]|\d+\.) +", "", text))


def sentences(text: str) -> Iterator[Sentence]:
    """The sentences of a paragraph. The end of one is . or ? before a space and a new beginning."""
    begin = 0
    for end in re.finditer(r"[.?!][)\"”*_]*(?=\s+[\"“(*`\[A-Z0-9]|\s*$)", text):
        piece = text[begin : end.end()]
        if ABBREVIATED.search(piece):
            continue
        skipped = len(piece) - len(piece.lstrip())
        yield text.count("\n", 0, begin + skipped), " ".join(piece.split())
        begin = end.end()
    if text[begin:].strip():
        skipped = len(text[begin:]) - len(text[begin:].lstrip())
        yield text.count("\n", 0, begin + skipped), " ".join(text[begin:].split())


def of_docstring(text: str) -> Iterator[Sentence]:
    """The sentences of a docstring; of the entries of Args, Returns and the like without names."""
    lines, inside, indents = text.splitlines(), False, 0
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if SECTION.fullmatch(line.strip()):
            inside, indents = True, indent
        elif inside and line.strip():
            if indent <= indents:
                inside = False
            elif indent <= indents + 4 and (entry := ENTRY.match(line.strip())):
                lines[number] = "- " + line.strip()[entry.end() :]
    for start, block in blocks(lines):
        for line, sentence in sentences(block):
            yield start + line, sentence


def docstrings(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(first line, text) of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def judged(found: Iterator[tuple[str, str]]) -> tuple[list[str], int]:
    """(the sentences that begin with an avoided word as `place: sentence`, number of all)."""
    bad, count = [], 0
    for place, sentence in found:
        bare = re.sub(r"^[\W_]+", "", sentence)
        count += 1
        if AVOIDED.match(bare) and not sentence.rstrip("*_) ").endswith("?"):
            bad.append(f"{place}: {sentence[:120]}")
    return bad, count


def code_sentences() -> Iterator[tuple[str, str]]:
    """(file:line, sentence) of every docstring."""
    for path in CODE:
        for first, text in docstrings(path):
            for line, sentence in of_docstring(text):
                yield f"{path.relative_to(ROOT)}:{first + line}", sentence


def page_sentences() -> Iterator[tuple[str, str]]:
    """(file:line, sentence) of every page."""
    for path in PAGES:
        for start, block in blocks(path.read_text().splitlines()):
            for line, sentence in sentences(block):
                yield f"{path.relative_to(ROOT)}:{start + line + 1}", sentence


def test_docstrings_begin_with_their_subject():
    bad, count = judged(code_sentences())
    assert count > 1000
    assert len(bad) < MOST * count, f"{len(bad)} of {count}:\n" + "\n".join(bad)


def test_pages_begin_with_their_subject():
    bad, count = judged(page_sentences())
    assert count > 300
    assert len(bad) < MOST * count, f"{len(bad)} of {count}:\n" + "\n".join(bad)


TEXT = """Weights of a teacher. What is read, is
kept. Who reads it?

Args:
    name: of a file, e.g. Of Human Bondage. Else none.
    other (int): The count.

- Where it lies.
"""


def test_the_beginnings_are_found():
    bad, count = judged((str(line), text) for line, text in of_docstring(TEXT))
    assert count == 7
    assert [line.split(":")[0] for line in bad] == ["0", "4", "4", "7"]
