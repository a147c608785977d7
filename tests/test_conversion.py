"""Conversion against lifelines and on people whose course is known, and follow-up visits of the simulated cohort on disk."""
import numpy as np
import pandas as pd
import pytest

from explainable_mri.config import SplitConfig
from explainable_mri.data.phantom import FollowUp, PhantomError, draw_person, simulate_cohort
from explainable_mri.data.splits import check_leakage, make_splits
from explainable_mri.data.volumes import GRIDS
from explainable_mri.evaluation.conversion import ConversionError, conversion_curves, conversion_times
from explainable_mri.registry import COHORTS


def follow(count, seed=0, **options):
    "Visits and true courses of simulated people, without their scans."
    people = [FollowUp(**{"visits": 5, "dropout": 0.1} | options).draw(draw_person(number, seed), seed) for number in range(1, count + 1)]
    visits = pd.DataFrame([{"subject": f"sub-{one.number:04}", "age": one.age_at(visit), "group": one.group_at(visit), "degree": one.degree, "rate": one.course.rate}
                           for one in people for visit in range(1, one.visits + 1)])
    return visits, {f"sub-{one.number:04}": one for one in people}


def test_times_are_those_of_the_true_course():
    "Failed before: 71.3 − 70.3 years and 70.2 − 69.2 years were different times, so that people who converted together did not."
    visits, people = follow(900)
    times = conversion_times(visits)
    assert set(times.years) == {1.0, 2.0, 3.0, 4.0, 5.0}
    for row in times.itertuples():
        person = people[row.subject]
        seen = None if person.course.onset is None else np.ceil(person.course.onset)
        assert row.converted == (seen is not None and seen < person.visits)
        assert row.years == (seen if row.converted else person.visits - 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_drives_conversion_divides_the_curves_and_chance_does_not(seed):
    times = conversion_times(follow(900, seed)[0])
    drawn = [conversion_curves(times.assign(drawn=np.random.default_rng(number).random(len(times))), "drawn").p for number in range(200)]
    assert 0.005 <= np.mean(np.array(drawn) < 0.05) <= 0.1  # a true null is rejected about once in twenty times
    for name, threshold in (("degree", times.degree.median()), ("rate", 0.02)):  # controls' rate is 0.005, which the others with MCI have
        assert conversion_curves(times, name, [threshold]).p < 0.001
    none = conversion_times(follow(300, seed, converters=0)[0])
    assert not none.converted.any()
    with pytest.raises(ConversionError, match="Nobody of"):
        conversion_curves(none, "degree", [0.2])


def test_curves_and_test_are_those_of_lifelines():
    "Numbers of lifelines 0.30.3 with pandas 2.3.3 on the same people: KaplanMeierFitter, logrank_test, concordance_index."
    times = conversion_times(follow(240)[0])
    found = conversion_curves(times, "degree", [0.2])
    p, concordance = 0.014194290345977315, 0.7216024340770791
    expected = {  # share without conversion and its interval after 1, 2, 3, 4 and 5 years
        "below 0.2": ([1, 1, 1, 0.9130435, 0.7688787], [1, 1, 1, 0.6949475, 0.5297634], [1, 1, 1, 0.9775157, 0.8969774]),
        "0.2 or more": ([0.8461538, 0.7096774, 0.6082949, 0.5702765, 0.5702765], [0.6892243, 0.5367502, 0.4258929, 0.3855377, 0.3855377],
                        [0.9277611, 0.8277718, 0.7486412, 0.7182419, 0.7182419])}
    for part, (free, low, high) in expected.items():
        own = found.curves[(found.curves.part == part) & (found.curves.years > 0)]
        np.testing.assert_allclose(own.free, free, atol=1e-6)
        np.testing.assert_allclose(own.low.fillna(1), low, atol=1e-6)  # where nobody has converted yet we give no interval, lifelines 1 to 1
        np.testing.assert_allclose(own.high.fillna(1), high, atol=1e-6)
    assert found.p == pytest.approx(p, rel=1e-6) and found.concordance == pytest.approx(concordance, abs=1e-9)


def test_follow_up_keeps_visits_together_and_trains_on_the_first(tmp_path):
    options = {"folder": tmp_path, "scans": 90, "follow_up": {"visits": 3, "dropout": 0.1}}
    first, every = (COHORTS.build("phantom", GRIDS["mni_6mm"], ["CN", "MCI", "AD"], ["age"], **options, visits=visits) for visits in (None, "all"))
    assert not first.table.subject.duplicated().any() and len(every) >= 90
    assert any("left out" in note for note in first.notes) and any("changes between visits" in note for note in every.notes)
    for split in make_splits(every.table, SplitConfig(name="stratified", params={"folds": 3}), 0):
        check_leakage(every.table, split)
    visits, course = (pd.read_csv(tmp_path / name, sep="\t") for name in ("participants.tsv", "course.tsv"))
    assert visits.groupby("subject").years.max().reindex(course.subject).tolist() == course.followed.tolist()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.tsv")}
    simulate_cohort(tmp_path, scans=60, grid="mni_6mm", follow_up=options["follow_up"])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.tsv")}
    with pytest.raises(PhantomError, match="follow_up"):
        simulate_cohort(tmp_path, scans=60, grid="mni_6mm", follow_up={"visits": 4})
