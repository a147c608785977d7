"""The published predictions of Dyrba et al. (2021) give the published metrics."""
import json
from pathlib import Path

import pandas as pd
import pytest

from explainable_mri.training.metrics import group_metrics

PUBLISHED = Path(__file__).parents[2] / "shared" / "reference" / "published"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published reference data are not in {PUBLISHED}")
@pytest.mark.parametrize("cohort", ["ADNI2", "DELCODE"])
def test_published_metrics(cohort):
    predictions = pd.read_csv(PUBLISHED / f"predictions_{cohort}.csv")
    expected = json.loads((PUBLISHED / f"metrics_{cohort}.json").read_text())
    metrics = group_metrics(predictions["group"], predictions["probability"])
    assert metrics.keys() == expected.keys()
    for comparison, values in expected.items():
        assert {name: round(metrics[comparison][name], 4) for name in values} == values
