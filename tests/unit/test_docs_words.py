"""The documentation uses the project's words, short sentences and links that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", ROOT / "src/lamina/assets/nano/README.md", ROOT / "tools/nano/README.md"]
PAGES = sorted([*READMES, *(ROOT / "docs").rglob("*.md")])
GENERATED = ("compare", "results", "papers", "growth", "methods")
"""Markers between which scripts write. `docs/results/speed.md` is written whole."""
WRITTEN_WHOLE = {ROOT / "docs/results/speed.md"}
LONGEST = 45
"""Words of the longest sentence."""
FORBIDDEN = {
    r"\b(a|the|one|each|every|NVIDIA|on|of) cards?\b": "GPU",
    r"\bprocessors?\b": "CPU",
    r"\b(is|be|are|was|were|when|if|where|never|once|not) told\b|\btold (the|of|which|predictions|task)\b": "task-aware",
    r"\btask (known|recognised)\b|\bknown_task\b|\bTask told\b": "task-aware accuracy, task-inference accuracy",
    r"\bjoined\b": "joint",
    r"\brows? of the (head|classifier)\b|\bhead rows?\b|\bown rows\b|\bown heads?\b": "outputs, own classifier",
    r"--merge\b|--head\b|--joined\b|\bconsolidation\.(merge|head|own_rank|gamma|floor|shrinkage)\b": "the new flag or key",
    r"\bown_rank\b|\breuse_mb\b|\bkeep_chain\b|\bdata\.views\b|\btraining\.distil\b|\brun\.replay\b": "the new key, if any",
    r"\bmoved means\b|\bmoving statistics\b|\bshift of\b|\bthe (shift|tail)\b": "drift compensation, unified classifier",
    r"\baround (a|the|any|some) methods?\b|\bwhat happens around\b": "consolidation",
    r"\bin (halves|one piece)\b": "split batch, unsplit",
    r"\bslots?\b": "adapter site",
    r"\badapted maps?\b": "adapted layer",
    r"(?<!first )\bexperts?\b": "routed adapter",
    r"\b(floor to beat|the floor|the ceiling)\b": "lower bound, upper bound",
    r"\b(right |an? |the )answers?\b|\banswering\b": "prediction",
    r"\bby example\b": "micro",
    r"\bchance\.py\b|\bhalves\.py\b|\bblock\.py\b|\breuse\.py\b|\bconsolidate\.md\b": "the new name",
    r"\bof which\b|\bwhereby\b|\bbe it\b": "two sentences",
    r"\bLAMBDA_TABLE\b": "a number",
}


def prose(page: Path) -> str:
    """Returns the hand-written text of a page: no code, no generated part, no front matter, no address of a link."""
    text = page.read_text(encoding="utf-8")
    if page in WRITTEN_WHOLE:
        return ""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    for name in GENERATED:
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(text: str) -> list[str]:
    """Returns the sentences of paragraphs and list items, semicolons ending one. Tables and headings have none."""
    lines = ["" if line.startswith(("|", "#")) else line for line in text.splitlines()]
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines))
    found = [re.split(r"(?<=[.!?;])[*)\"]*\s+", " ".join(block.split())) for block in blocks]
    return [sentence for parts in found for sentence in parts if sentence]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_words_of_the_project(page: Path) -> None:
    text = prose(page)
    wrong = [
        f"{match.group(0)!r}: write {better!r}, in: {text[max(0, match.start() - 40) : match.end() + 40]!r}"
        for pattern, better in FORBIDDEN.items()
        for match in re.finditer(pattern, text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_sentence_is_short(page: Path) -> None:
    long = [sentence for sentence in sentences(prose(page)) if len(sentence.split()) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_checks_find_what_they_are_for() -> None:
    assert re.search(next(iter(FORBIDDEN)), "on the card")
    assert len(sentences("One two. Three;\n\n- four\n- five\n\n| a row |\n# a heading")) == 4
    assert "drift-compensation" in anchors(ROOT / "docs/consolidation.md")
