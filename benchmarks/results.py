"""RESULTS.md holds a section for each benchmark; a new run replaces its own."""
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def write_section(mark: str, text: str) -> None:
    "Put a benchmark's text, Markdown with its heading, in the place of what it wrote before, or at the end."
    begin, end = f"<!-- begin {mark} -->", f"<!-- end {mark} -->"
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Measured\n"
    if begin in old:
        old = old[:old.index(begin)] + old[old.index(end) + len(end):].lstrip("\n")
    RESULTS.write_text(f"{old.rstrip()}\n\n{begin}\n{text}\n{end}\n", encoding="utf-8")


def bring_up_memory(
    gigabytes: float,  # as much as what is measured next may need, page cache included
) -> None:
    "Touch memory and free it, so that a virtual machine has got it from its host before anything is timed."
    subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({int(gigabytes * 1e9)}, numpy.uint8)"], check=True)
