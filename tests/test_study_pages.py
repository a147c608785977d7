"""The pages that answer questions by numbers: what they show, as committed, is what the data give."""
import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

NBS = Path(__file__).parents[1] / "nbs"


def shown(page: str) -> str:
    "All text that a page shows, as it was executed."
    outputs = [output for cell in nbformat.read(NBS / page, 4).cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.parametrize("cohort", ["ADNI2", "DELCODE"])
def test_published_numbers_are_shown_with_intervals_around_them(shared, cohort):
    expected = json.loads((shared / f"reference/published/metrics_{cohort}.json").read_text())
    text = shown("published_results.ipynb")
    for comparison, values in expected.items():
        for name in [name for name in values if name != "n"]:
            pattern = rf"{cohort}\s+{comparison.replace('_', ' ')}\s+{name.replace('_', ' ')}\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)"
            published, measured, low, high = map(float, re.search(pattern, text).groups())
            assert published == measured == round(values[name], 3) and low < measured < high
