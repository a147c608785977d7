"""RESULTS.md holds a section for each benchmark; a new run replaces its own."""
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def write_section(mark: str, text: str) -> None:
    "Put a benchmark's text, Markdown with its heading, in the place of what it wrote before, or at the end."
    begin, end = f"<!-- begin {mark} -->", f"<!-- end {mark} -->"
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Measured\n"
    if begin in old:
        old = old[:old.index(begin)] + old[old.index(end) + len(end):].lstrip("\n")
    RESULTS.write_text(f"{old.rstrip()}\n\n{begin}\n{text}\n{end}\n", encoding="utf-8")
