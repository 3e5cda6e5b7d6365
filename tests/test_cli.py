"""The commands besides bench: what they print and what they return."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import pytest
import torch

from aiter_inductor.cli import code_objects
from aiter_inductor.cli.cases import load_ops
from aiter_inductor.cli.command import COMMANDS, main
from aiter_inductor.core import config, jit
from aiter_inductor.core.arch import KNOWN
from aiter_inductor.core.jit import NoCompilerError, default_settings, find_compiler
from aiter_inductor.kernels.hip.loading import collecting_modules
from aiter_inductor.kernels.hip.norm import rms_norm


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_no_command_is_a_mistake(capsys):
    assert main([]) == 2
    assert main(["benhc"]) == 2
    assert "unknown command 'benhc'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"aiter_inductor {name}" in capsys.readouterr().out


def test_doctor_shows_every_variable_with_value_and_meaning(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("AITER_INDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernel.co").write_bytes(b"12345")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for variable in config.VARIABLES.values():
        line = next(line for line in shown.splitlines() if line.split()[:1] == [variable.name])
        assert variable.meaning in line
        assert (variable.value or "(empty)") in line
    assert f"{tmp_path} [set]" in shown
    assert "1 files, 0.0 MB" in shown


def test_doctor_shows_what_is_available(capsys):
    main(["doctor"])
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    for name in KNOWN:
        assert f"of {len(load_ops())} ops" in rows[name]
    assert "triton" in rows["gfx942"]
    assert "absent" not in rows["torch_dynamo_backends:aiter"]
    assert "absent" not in rows["torch.backends:aiter_inductor"]


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    main(["doctor"])
    host = next(line for line in capsys.readouterr().out.splitlines() if "  host " in line)
    assert "none of g++" in host


def test_explain_plans_for_a_chip_that_is_not_here(capsys):
    status = main(["explain", "small-llama", "--target", "gfx942", "--layers", "1"])
    shown = capsys.readouterr().out
    assert "target gfx942, 1 graph" in shown
    rows = [line.split()[:3] for line in shown.splitlines()]
    assert ["rms_norm", "fused", "triton"] in rows
    assert status == ("missed" in shown)


@pytest.mark.parametrize(
    ("disabled", "line"),
    [
        ((), r"code: add_rms_norm by triton: norm_kernel\.hsaco sha256:[0-9a-f]{12}"),
        (("triton",), r"code: add_rms_norm by hip: norm(-[0-9a-f]{32}/norm\.co|: not built yet)"),
    ],
    ids=["triton", "hip"],
)
def test_explain_names_the_code_objects_for_a_chip_that_is_not_here(capsys, disabled, line):
    try:
        find_compiler("gfx942", default_settings())
    except NoCompilerError as error:
        pytest.skip(str(error))
    main(["explain", "small-llama", "--target", "gfx942", "--layers", "1", "--code-objects",
          "--disable", *disabled])  # fmt: skip
    assert re.search(line, capsys.readouterr().out)


def test_a_built_kernel_is_named_by_the_hash_it_was_built_with(tmp_path, monkeypatch):
    settings = replace(default_settings(), cache_dir=tmp_path)
    monkeypatch.setattr(jit, "default_settings", lambda: settings)
    try:
        find_compiler("gfx942", settings)
    except NoCompilerError as error:
        pytest.skip(str(error))
    with collecting_modules("gfx942") as modules:
        rms_norm(torch.empty(4, 256, device="meta"), None, 1e-6)
    (module,) = modules
    assert code_objects._hip_file(module, "gfx942") == "norm: not built yet"
    artifact = jit.load(module, "gfx942", settings)
    digest = hashlib.sha256(artifact.path.read_bytes()).hexdigest()
    named = code_objects._hip_file(module, "gfx942")
    assert named == f"{artifact.path.parent.name}/norm.co sha256:{digest[:12]}"
