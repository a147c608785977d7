"""Forty inputs of the generator in tests/fuzz; `python -m tests.fuzz` tries as many as one likes."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz.doors import DOORS
from fuzz.judge import KINDS, Observation, judge
from fuzz.run import run

OTHERS = ("Keras", "native")  # files that chapters 36 to 38 read have tests of their own


def test_forty_wrong_inputs_are_refused_or_accepted_for_a_reason(tmp_path):
    doors = [door.name for door in DOORS if not door.name.startswith(OTHERS)]
    verdicts = run(seed=0, count=40, doors=doors, keep=tmp_path / "originals")
    assert len(verdicts) == 40
    wrong = [f"{one.kind} [{one.door}] {one.change}: {one.detail}\n{one.words}" for one in verdicts if one.kind not in KINDS[:2]]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("found, meaning, kind", [
    (Observation("refused", "scan.nii: not on the grid. Choose another."), "wrong", "refused"),
    (Observation("refused", "Something is wrong. Choose another."), "wrong", "unexpected"),
    (Observation("refused", "KeyError: 'x' in scan.nii\nThis was not expected."), "wrong", "unexpected"),
    (Observation("unexpected", "Traceback"), "wrong", "unexpected"),
    (Observation("hanging", "90 s"), "wrong", "hanging"),
    (Observation("refused", "scan.nii: gone. Copy it.", left=[".partial-x"]), "wrong", "half files"),
    (Observation("result", result={"p": 0.5}), "wrong", "accepted"),
    (Observation("result", result={"p": 0.7}), "wrong", "silent change"),
    (Observation("result", result={"p": 0.7}), "other", "accepted"),
    (Observation("result", result={"p": 0.7}, said={"NaN is read as 0."}), "wrong", "accepted")])
def test_the_judge_knows_what_must_not_happen(found, meaning, kind):
    assert judge(found, Observation("result", result={"p": 0.5}), meaning, ["scan.nii"])[0] == kind
