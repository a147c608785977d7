"""What became of an input: refused in a sentence, accepted for a reason, or one of the four things that must not happen."""
import logging
import os
import pickle
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from explainable_mri import environment
from explainable_mri.cli import describe_error
from explainable_mri.errors import ExplainableMRIError

# The last four must not happen.
KINDS = ["refused", "accepted", "unexpected", "hanging", "half files", "silent change"]
SECONDS, MEMORY = 90, 4_000_000_000  # of an input, before it counts as hanging

# A sentence that helps says what was expected, or what to do.
_REMEDY = re.compile(
    r"\b(choose|convert|copy|correct|write|give|set|save|train|run|take|name|use|make|restore|keep|delete|remove|rename|add|mend|find|put|check"
    r"|export|expected|must|needs?|did you mean|put|ask|fetch|end|correct|cut|holds?|has|have|ends?|is no|are no|there is no|missing|input should|input is not|duplicate|empty|not a number|lack)\b", re.I)


@dataclass
class Observation:
    "What a door made of a folder."

    kind: str                                  # "result", "refused", "unexpected", "hanging"
    message: str = ""                          # of a refusal, or the traceback
    result: dict[str, Any] = field(default_factory=dict)  # arrays, numbers and texts by name
    said: set[str] = field(default_factory=set)  # notes, warnings and lines of the log
    left: list[str] = field(default_factory=list)  # files that are not whole


@dataclass(frozen=True)
class Verdict:
    "The judgement about one input."

    door: str
    change: str   # the kind of change
    detail: str   # what was changed, and into what
    kind: str     # one of `KINDS`
    words: str    # what was said, or what is wrong
    seconds: float


class _Collector(logging.Handler):
    "Keeps what is logged."

    def __init__(self, lines: set[str]):
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.add(record.getMessage())


def _attempt(use: Callable[[], tuple[dict, list[str]]]) -> Observation:
    "Use a door in this process."
    said: set[str] = set()
    logging.getLogger().addHandler(_Collector(said))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, notes = use()
        said |= {str(one.message) for one in caught} | set(notes)
        return Observation("result", result=result, said=said)
    except ExplainableMRIError as error:
        return Observation("refused", describe_error(error))
    except BaseException as error:
        words = describe_error(error)
        expected = isinstance(error, OSError | MemoryError) and "not expected" not in words
        return Observation("refused", words) if expected else Observation("unexpected", "".join(traceback.format_exception(error)[-6:]))


def observe(use: Callable[[], tuple[dict, list[str]]], folder: Path, seconds: float = SECONDS) -> Observation:
    "Use a door in a process of its own, in a folder, within limits of time and memory."
    answer, said = folder.with_name(folder.name + ".answer"), folder.with_name(folder.name + ".said")
    number = os.fork()
    if number == 0:
        try:
            os.setsid()
            os.chdir(folder)
            output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            environment._PROCESS = os.getpid()  # it speaks for itself
            sys.stdin = open(os.devnull)
            observation = _attempt(use)
            answer.write_bytes(pickle.dumps(observation))
        finally:
            os._exit(0)
    found = _wait(number, answer, seconds)
    found.left = [str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.name.startswith((".partial-", ".removed-"))] if found.kind != "hanging" else []
    answer.unlink(missing_ok=True)
    return found


def _wait(number: int, answer: Path, seconds: float) -> Observation:
    "Wait for a process, and end it past its limits."
    start = time.monotonic()
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            break
        try:
            memory = int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            memory = 0
        if memory > MEMORY or time.monotonic() - start > seconds:
            os.killpg(number, signal.SIGKILL)
            os.waitpid(number, 0)
            return Observation("hanging", f"{memory / 1e9:.1f} GB of memory after {time.monotonic() - start:.0f} s")
        time.sleep(0.01)
    if not answer.exists():
        return Observation("unexpected", f"the process ended with status {status}")
    return pickle.loads(answer.read_bytes())


def same(one: Any, other: Any) -> bool:
    "Whether two results are one."
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 + 1e-5 * abs(other) or one == other or (one != one and other != other)
    return one == other


def judge(found: Observation, original: Observation, meaning: str, names: list[str], remedies: bool = True) -> tuple[str, str]:
    """The kind of an outcome, and words about it.

    `meaning` is what a change means: "wrong": nobody can want its result, so it must be refused or said; "other": it makes another input that
    is as valid; `names` are words of which a refusal must name one: files, folders, keys."""
    if found.kind in ("unexpected", "hanging"):
        return found.kind, found.message
    if found.left:
        return "half files", ", ".join(found.left)
    if found.kind == "refused":
        if "not expected" in found.message or "Traceback" in found.message:
            return "unexpected", found.message
        if not any(name in found.message for name in names):
            return "unexpected", f"(no file or key is named) {found.message}"
        return ("refused", found.message) if not remedies or _REMEDY.search(found.message) else ("unexpected", f"(no remedy) {found.message}")
    if same(found.result, original.result):
        return "accepted", "the result is the same"
    if news := found.said - original.said:
        return "accepted", "it is said: " + "; ".join(sorted(news))
    if meaning == "other":
        return "accepted", "another valid input"
    different = [name for name in found.result if not same(found.result[name], original.result.get(name))]
    return "silent change", f"{', '.join(different)} of the result differ, and nothing is said"
