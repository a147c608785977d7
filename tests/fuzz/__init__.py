"""Valid inputs, changed at random in ways that happen to files, and what the program makes of each.

`python -m tests.fuzz --seed 1 --count 300` tries 300 of them and prints counts; `tests/test_fuzz.py` tries 40."""
from .judge import KINDS, Verdict, judge
from .run import run

__all__ = ["KINDS", "Verdict", "judge", "run"]
