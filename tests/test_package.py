"""The package as users meet it: entry points, one environment variable, what the wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import aiter_inductor
from aiter_inductor.core import config

ROOT = Path(__file__).parents[1]

COMPILE = """
import torch, sys
def norm(x):
    return torch.nn.functional.rms_norm(x, (64,))
x = torch.randn(4, 64)
torch.testing.assert_close(torch.compile(norm{arguments})(x), norm(x))
print("imported" if "aiter_inductor.backend" in sys.modules else "not imported")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)


def test_public_names_are_there():
    for name in aiter_inductor.__all__:
        assert getattr(aiter_inductor, name) is not None
    with pytest.raises(AttributeError, match="explane"):
        aiter_inductor.explane  # noqa: B018


def test_version_is_the_distributions():
    assert version("aiter-inductor") == aiter_inductor.__version__


def test_entry_points_load():
    (backend,) = {e.value for e in entry_points(group="torch_dynamo_backends", name="aiter")}
    assert backend == "aiter_inductor.backend:aiter"
    (autoload,) = {e.value for e in entry_points(group="torch.backends", name="aiter_inductor")}
    assert autoload == "aiter_inductor.autoload:autoload"


def test_backend_needs_no_import():
    said = run(COMPILE.format(arguments=', backend="aiter"'), AITER_INDUCTOR_REPORT="1")
    assert said.stdout == "imported\n"
    assert "aiter_inductor report: target cpu" in said.stderr


@pytest.mark.parametrize(
    ("variable", "arguments", "expected"),
    [
        ("1", "", "imported\n"),
        ("1", ', backend="inductor"', "not imported\n"),
        ("0", "", "not imported\n"),
    ],
)
def test_one_variable_enables_it(variable, arguments, expected):
    said = run(COMPILE.format(arguments=arguments), AITER_INDUCTOR=variable)
    assert said.stdout == expected


def test_a_wrong_value_of_the_variable_is_a_warning():
    said = run(COMPILE.format(arguments=""), AITER_INDUCTOR="perhaps")
    assert said.stdout == "not imported\n"
    assert "'perhaps' but must be 0 or 1" in said.stderr


def test_wheel_holds_all_sources(tmp_path):
    """To the build, kernel sources, tables and py.typed are data: unnamed, they stay behind."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("aiter_inductor", "cdnasim"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(source).as_posix()
        for folder in ("aiter_inductor", "cdnasim")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert wanted <= shipped, sorted(wanted - shipped)


def test_options_are_documented():
    """docs/options.md has a row for every variable and option, with its meaning, and no other."""
    text = (ROOT / "docs" / "options.md").read_text()
    rows = {
        line.split("|")[1].strip().strip("`"): line
        for line in text.splitlines()
        if line.startswith("| `")
    }
    assert rows.keys() == config.VARIABLES.keys() | set(config.OPTION_NAMES)
    for variable in config.VARIABLES.values():
        assert variable.meaning in rows[variable.name]
