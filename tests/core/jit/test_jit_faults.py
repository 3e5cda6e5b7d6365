"""What may go wrong around the cache ends in a right answer or in one clear line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from aiter_inductor.core.jit import BuildError, CacheError, JitWarning, load

CHILD = """
import sys
from pathlib import Path
from aiter_inductor.core.jit import JitSettings, Module, load
source, cache_dir, compiler = map(Path, sys.argv[1:])
settings = JitSettings(cache_dir, host_compiler=compiler, build_timeout_s=60)
print(load(Module("answer", (source,)), "host", settings).sha256)
"""


def start(module, settings) -> subprocess.Popen[str]:
    command = (
        sys.executable, "-c", CHILD,
        str(module.sources[0]), str(settings.cache_dir), str(settings.host_compiler),
    )  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def outputs(processes) -> set[str]:
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return set(said)


def test_eight_processes_starting_cold_build_once(module, settings, tmp_path, counting_after):
    slow = counting_after("sleep 0.5")
    settings = replace(settings, host_compiler=slow.path)
    assert len(outputs([start(module, settings) for _ in range(8)])) == 1
    assert slow.builds == 1


def test_process_killed_while_building_does_not_block_the_rest(
    module, settings, tmp_path, counting_after
):
    flag = tmp_path / "hang"
    flag.touch()
    slow = counting_after(f"[ -e {flag} ] && sleep 20")
    settings = replace(settings, host_compiler=slow.path)
    first = [start(module, settings) for _ in range(3)]
    while not slow.builds:
        time.sleep(0.01)
    flag.unlink()
    assert list(settings.cache_dir.glob("host/.building-*"))
    for process in first:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    time.sleep(0.5)  # a compiler whose parent was killed still counts itself
    begun = slow.builds
    started_s = time.monotonic()
    assert len(outputs([start(module, settings) for _ in range(6)])) == 1
    assert time.monotonic() - started_s < 15
    assert slow.builds == begun + 1
    assert not list(settings.cache_dir.glob("host/.building-*"))


@pytest.mark.parametrize("damage", ["truncated", "changed", "record", "missing"])
def test_damaged_entry_is_reported_and_rebuilt(module, settings, counting, damage):
    settings = replace(settings, host_compiler=counting.path)
    artifact = load(module, "host", settings)
    content = artifact.path.read_bytes()
    if damage == "truncated":
        artifact.path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        artifact.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "record":
        (artifact.path.parent / "entry.json").write_text('{"name": "answer"')
    else:
        artifact.path.unlink()
    with pytest.warns(JitWarning, match="it is not used"):
        again = load(module, "host", settings)
    assert again.read() == content
    assert counting.builds == 2


def test_record_cannot_point_outside_its_entry(module, settings, counting, tmp_path):
    settings = replace(settings, host_compiler=counting.path)
    artifact = load(module, "host", settings)
    record = artifact.path.parent / "entry.json"
    fields = json.loads(record.read_text())
    fields["artifact"] = str(tmp_path / "answer.c")
    record.write_text(json.dumps(fields))
    with pytest.warns(JitWarning, match="is not a record of a build"):
        assert load(module, "host", settings).path == artifact.path


def test_directory_that_others_can_write_is_refused(module, settings, counting):
    settings = replace(settings, host_compiler=counting.path)
    load(module, "host", settings)
    settings.cache_dir.chmod(0o777)
    with pytest.warns(JitWarning), pytest.raises(CacheError, match=r"by others \(mode 777\)"):
        load(module, "host", settings)


def test_directory_that_cannot_be_made_is_one_line(module, settings, counting, tmp_path):
    (tmp_path / "file").touch()
    settings = replace(settings, cache_dir=tmp_path / "file/cache", host_compiler=counting.path)
    with pytest.warns(JitWarning), pytest.raises(CacheError, match="cannot be made: Not a dir"):
        load(module, "host", settings)


def test_read_only_directory_still_serves_what_it_holds(module, settings, counting):
    settings = replace(settings, host_compiler=counting.path)
    artifact = load(module, "host", settings)
    settings.cache_dir.chmod(0o500)
    if os.access(settings.cache_dir, os.W_OK):
        pytest.skip("this user writes into read-only directories: run without CAP_DAC_OVERRIDE")
    assert load(module, "host", settings) == artifact
    other = replace(module, defines=(("OTHER", "1"),))
    with pytest.warns(JitWarning), pytest.raises(CacheError, match="is read-only"):
        load(other, "host", settings)


def test_disk_error_while_building_is_not_remembered(module, settings, counting, monkeypatch):
    from aiter_inductor.core.jit import store

    settings = replace(settings, host_compiler=counting.path)

    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_fsync", full_disk)
        with pytest.warns(JitWarning), pytest.raises(BuildError, match="No space left on device"):
            load(module, "host", settings)
    assert load(module, "host", settings).read()
