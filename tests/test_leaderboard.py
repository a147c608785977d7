"""The page on which map to believe: its numbers are those of the kept boards, and controls are held to what is known of them."""
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from explainable_mri.experiments.leaderboard import CONTROLS, QUESTIONS, against, board_table

NBS = Path(__file__).parents[1] / "nbs"


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return pd.read_csv(NBS / "data/leaderboard.csv", dtype={"subject": str})


def test_the_boards_are_whole(rows):
    assert (NBS / "data/leaderboard.csv").stat().st_size < 500_000
    assert rows.network.nunique() == 3 and rows.cohort.nunique() == 2 and rows.method.nunique() >= 20 and set(CONTROLS) <= set(rows.method)
    per_board = rows.groupby(["network", "cohort", "method"]).subject.nunique()
    assert (per_board == 10).all() and per_board.groupby(["network", "cohort"]).size().min() >= 35  # Grad-CAM cannot explain each network


def test_controls_are_what_they_are_by_their_nature(rows):
    means = rows.groupby("method")[list(QUESTIONS)].mean()
    assert (means.sensitivity[["t_map", "linear_weights"]] == 0).all()  # one map for all scans
    assert np.allclose(means.after_randomisation[list(CONTROLS)], 1)    # none asks the network
    assert abs(means.sensitivity["random"] - 2**0.5) < 0.05             # two independent noises
    by_chance = rows[rows.method == "random"].groupby("subject").average_precision.mean()
    assert by_chance.max() < 0.3


def test_the_table_agrees_with_plain_means(rows):
    own = rows[(rows.network == "cnn") & (rows.cohort == 0)].drop(columns=["network", "cohort"])
    table = board_table(own, 50).set_index("method")
    for measure in QUESTIONS:
        for name, values in own.groupby("method")[measure]:
            assert np.isclose(table[measure][name], values.mean(), equal_nan=True)
            if values.notna().all() and values.nunique() > 1:
                assert values.min() <= table[f"{measure}_low"][name] <= table[f"{measure}_high"][name] <= values.max()
    difference = against(own, "infidelity", "random", 50).set_index("method")
    assert np.isclose(difference.difference["gradient"], table.infidelity["gradient"] - table.infidelity["random"])


def test_the_page_shows_the_kept_boards(rows):
    outputs = [output for cell in nbformat.read(NBS / "leaderboard.ipynb", 4).cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    assert f"{rows.method.nunique()} methods, 3 networks, 2 cohorts" in text and f"{len(rows)} maps" in text
    for method in rows.method.unique():
        assert method in text
