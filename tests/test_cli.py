"""The commands besides bench: what they print and what they return."""

from __future__ import annotations

import pytest

from aiter_inductor.cli.cases import load_ops
from aiter_inductor.cli.command import COMMANDS, main
from aiter_inductor.core import config
from aiter_inductor.core.arch import KNOWN


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
