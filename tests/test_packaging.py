"""The wheel works without the notebooks, nbdev and Jupyter: built, installed into an empty environment, imported and run."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
IMPORT_ALL = """
import importlib, pkgutil, sys
import explainable_mri
names = [module.name for module in pkgutil.walk_packages(explainable_mri.__path__, "explainable_mri.")]
for name in names:
    importlib.import_module(name)
print(len(names))
tools = [name for name in ("nbdev", "fastcore", "IPython", "notebook", "jupyterlab", "papermill") if importlib.util.find_spec(name)]
sys.exit(f"the environment is not empty: {tools}" if tools else 0)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory, copy_repository) -> Path:
    "A new virtual environment that holds the built wheel and what it requires, nothing else."
    folder = tmp_path_factory.mktemp("packaging")
    source = copy_repository(folder / "source")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True)
    wheel, = folder.glob("*.whl")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where pip would find us installed
    subprocess.run([REPOSITORY / "scripts" / "install", folder / "venv", wheel], check=True,
                   env={**variables, "PIP_COMPILE": "0"})  # compiling what is never imported takes time
    return folder / "venv"


def test_wheel_imports_without_nbdev_and_jupyter(environment, tmp_path):
    run = subprocess.run([environment / "bin" / "python", "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1


def test_wheel_has_the_command_line(environment, tmp_path):
    run = subprocess.run([environment / "bin" / "explainable-mri", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in ("simulate", "train", "explain", "report", "info"))
