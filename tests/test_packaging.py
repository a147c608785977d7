"""The wheel works without the notebooks, nbdev and Jupyter: built, installed into an empty environment, imported and run."""
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def requirements(package: Distribution) -> list[Requirement]:
    "What a package requires here, without its extras."
    needed = map(Requirement, package.requires or [])
    return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


def required(package: Distribution) -> list[Distribution]:
    "The installed packages that a package requires, and those that they require in turn; raises where one is absent or too old or new."
    found, open_ends = {}, requirements(package)
    while open_ends:
        one = open_ends.pop()
        other = distribution(one.name)
        assert one.specifier.contains(other.version, prereleases=True), f"{one} is required, {other.version} is installed"
        if other.name not in found:
            found[other.name] = other
            extras = [Requirement(text) for text in other.requires or []]
            open_ends += requirements(other) + [more for more in extras for extra in one.extras
                                                if more.marker is not None and more.marker.evaluate({"extra": extra})]
    return list(found.values())


def link(package: Distribution, target: Path) -> None:
    "Put an installed package into another environment by links, which takes no time, as copying gigabytes would."
    for top in {file.parts[0] for file in package.files if file.parts[0] not in ("..", "__pycache__")}:
        source, place = Path(package.locate_file(top)), target / top
        if place.is_dir() and not place.is_symlink():
            continue
        if source.exists() and not place.exists():
            place.symlink_to(source)


@pytest.fixture(scope="module")
def environment(tmp_path_factory, copy_repository) -> Path:
    "A new virtual environment that holds the built wheel and what it requires, in the versions that are installed here, nothing else."
    folder = tmp_path_factory.mktemp("packaging")
    source = copy_repository(folder / "source")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True)
    wheel, = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "--python", folder / "venv", "install", "--no-deps", wheel], check=True)
    place, = folder.glob("venv/lib/python*/site-packages")
    built, = [one for one in Distribution.discover(path=[str(place)]) if one.name == "explainable-mri"]
    for package in required(built):
        link(package, place)
    return folder / "venv"


def test_wheel_imports_without_nbdev_and_jupyter(environment, tmp_path):
    run = subprocess.run([environment / "bin" / "python", "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1


def test_wheel_has_the_command_line(environment, tmp_path):
    run = subprocess.run([environment / "bin" / "explainable-mri", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in ("simulate", "train", "explain", "report", "info"))
