"""The launcher class of this process: C where a compiler is, ctypes where none is."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from aiter_inductor.core import jit
from aiter_inductor.core.launch.ctypes_launcher import CtypesLauncher

_SOURCE = Path(__file__).with_name("launcher.c")


def launcher_module() -> jit.Module:
    """The C launcher for this Python, whose ABI is part of the cache key."""
    abi = str(sysconfig.get_config_var("SOABI"))
    include = sysconfig.get_paths()["include"]
    flags = ("-Wno-missing-field-initializers", f"-DPYTHON_{abi.replace('-', '_')}", f"-I{include}")
    return jit.Module("launcher", (_SOURCE,), flags=flags)


@lru_cache
def launcher_class(settings: jit.JitSettings) -> type[Any]:
    """`Launcher` of launcher.c, built on first use; its ctypes twin if it cannot be built."""
    try:
        path = str(jit.load(launcher_module(), "host", settings).path)
    except jit.BuildError:
        return CtypesLauncher
    loader = ExtensionFileLoader("launcher", path)
    spec = spec_from_file_location("launcher", path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} cannot be loaded as an extension module")
    extension = module_from_spec(spec)
    loader.exec_module(extension)
    launcher: type[Any] = extension.Launcher
    return launcher
