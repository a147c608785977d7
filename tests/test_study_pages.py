"""The pages that answer questions by numbers: what they show, as committed, is what the data give."""
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from explainable_mri.evaluation.calibration import reliability_table
from explainable_mri.evaluation.summaries import comparison_table
from explainable_mri.tasks import Classification

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


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("count", range(10, 60))
def test_intervals_of_a_reliability_diagram_hold_the_share(share, count):
    "Failed before: rounding put the upper end below a share of 1, and the figure was refused."
    table = reliability_table([share] * count, np.linspace(0.4, 0.6, count))
    assert table.low.le(table.was).all() and table.high.ge(table.was).all()


def test_what_the_network_adds_is_what_the_table_of_the_study_gives():
    scans, text = pd.read_csv(NBS / "data/study_cnn.csv"), shown("what_the_network_adds.ipynb")
    task = Classification(classes={"CN": ["CN"], "MCI or AD": ["MCI", "AD"]})
    assert (NBS / "data/study_cnn.csv").stat().st_size < 200_000 and scans.groupby("subject").fold.nunique().max() == 1
    assert f"{len(scans)} scans of {scans.subject.nunique()} persons, {scans.fold.nunique()} folds" in text
    for row in comparison_table(task, scans, ["region_volume"]).itertuples():
        assert f"{row.comparison}, network against region_volume: {row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})" in text
    for row in comparison_table(task, scans.assign(**{"degree probability": scans.degree}), ["degree"]).itertuples():
        assert f"network {row.network:.3f}, true degree {row.other:.3f}, distance {row.difference:+.3f}" in text


def test_the_curve_of_sample_sizes_is_whole():
    curve = pd.read_csv(NBS / "data/sample_size.csv")
    assert curve.groupby(["of", "comparison", "scans"]).seed.nunique().eq(3).all() and curve.tested.nunique() == 1
    means = curve[curve.of == "network"].groupby(["comparison", "scans"]).auc.mean().unstack()
    assert (means[300] > means[20]).all()
