"""A search over configurations: an interrupted trial comes first again, values keep to their ranges, failures are named; nothing is trained here."""
import pytest

from explainable_mri.config import load_config, make_config
from explainable_mri.data.splits import SplitError
from explainable_mri.errors import ConfigError
from explainable_mri.experiments import sweep as searching

optuna = pytest.importorskip("optuna")
KEYS = {"training.learning_rate": {"low": 0.001, "high": 0.01, "log": True}, "training.batch_size": [10, 20], "training.epochs": {"low": 2, "high": 4}}


@pytest.fixture
def config(tmp_path):
    return make_config({
        "name": "tiny", "results": str(tmp_path / "results"), "sweep": {"folds": 2, "keys": KEYS},
        "cohort": {"name": "phantom", "params": {"folder": str(tmp_path / "data"), "scans": 96}}, "split": {"params": {"folds": 3}}})


def test_an_interrupted_trial_comes_first_again(config, tmp_path):
    values = []
    for _ in range(2):
        search = searching.open_search(config, tmp_path)
        assert searching.trial_table(search).empty  # one that was interrupted does not count
        search.sampler = searching.sampler_of(config, 0)
        values.append(searching._suggest(search.ask(), config.sweep.keys))
    assert values[0] == values[1]


@pytest.mark.parametrize("stopped", [0, 3, 11])  # at first values are drawn at random, after ten trials by what was found
def test_a_search_that_is_interrupted_tries_what_it_would_have_tried(config, monkeypatch, tmp_path, stopped):
    calls = []

    def run(trial, metric):
        calls.append(1)
        if len(calls) == stopped + 1 and trial.results.is_relative_to(tmp_path / "stopped"):
            raise KeyboardInterrupt
        return -abs(trial.training.learning_rate - 0.004) - trial.training.batch_size / 1000

    monkeypatch.setattr(searching, "run_trial", run)
    whole = searching.sweep(config, trials=13)
    calls.clear()
    other = make_config(config.model_dump(mode="json") | {"results": str(tmp_path / "stopped")})
    with pytest.raises(KeyboardInterrupt):
        searching.sweep(other, trials=13)
    again = searching.sweep(other, trials=13)
    assert again.table.equals(whole.table) and again.best.training == whole.best.training


def test_values_keep_to_their_ranges_and_kinds(config, tmp_path):
    search = searching.open_search(config, tmp_path)
    for _ in range(10):
        values = searching._suggest(search.ask(), config.sweep.keys)
        assert 0.001 <= values["training.learning_rate"] <= 0.01 and values["training.batch_size"] in (10, 20)
        assert isinstance(values["training.epochs"], int) and 2 <= values["training.epochs"] <= 4
        trial = searching.trial_config(config, values, tmp_path)
        assert trial.training.batch_size == values["training.batch_size"] and trial.cohort.name == "table"


def test_best_is_chosen_and_failures_are_named(config, monkeypatch):
    def run(trial, metric):
        if trial.training.batch_size == 20:
            raise SplitError("too many at once\nand more")
        return trial.training.learning_rate

    monkeypatch.setattr(searching, "run_trial", run)
    found = searching.sweep(config, trials=8)
    failed = found.table[found.table.state == "failed"]
    assert len(found.table) == 8 and (failed.why == "too many at once").all() and len(failed)
    assert found.best.training.learning_rate == found.table.value.max() and found.best.training.batch_size == 10
    assert load_config(found.folder / "best.yaml") == found.best and found.best.name == "tiny-sweep-1"
    assert len(searching.sweep(config, trials=8).table) == 8  # nothing is run again


def test_only_what_is_compared_by_the_same_measure_is_searched(config):
    for keys, words in (({}, "nothing to search"), ({"split.params.folds": [2, 3]}, "must leave as it is"), ({"seed": [1, 2]}, "must leave as it is")):
        with pytest.raises(ConfigError, match=words):
            searching.sweep(make_config(config.model_dump(mode="json") | {"sweep": {"keys": keys}}))


def test_no_test_scan_reaches_the_search(config, monkeypatch):
    from explainable_mri.data.splits import LeakageError, Split

    good = searching.split_cohort
    monkeypatch.setattr(searching, "split_cohort", lambda *given: (lambda split: Split(split.train, split.test[:1], split.test))(good(*given)))
    with pytest.raises(LeakageError, match="of the test part"):
        searching.sweep(config, trials=1)
