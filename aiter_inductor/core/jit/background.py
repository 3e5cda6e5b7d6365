"""Builds that run while another provider serves."""

from __future__ import annotations

import os
import threading

from aiter_inductor.core.jit.build import find, load
from aiter_inductor.core.jit.errors import BuildError
from aiter_inductor.core.jit.module import Module
from aiter_inductor.core.jit.settings import JitSettings
from aiter_inductor.core.jit.store import Artifact


class BackgroundBuilds:
    """Modules being built by daemon threads, `settings.jobs` at once.

    A daemon does not keep the process from ending; what it leaves half built is swept away by the
    next build of the same module. After a fork the child starts with none under way.
    """

    def __init__(self, settings: JitSettings) -> None:
        self._settings = settings
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._guard = threading.Lock()
        self._slots = threading.Semaphore(self._settings.jobs)
        self._outcomes: dict[tuple[Module, str], Artifact | str | None] = {}
        self._threads: list[threading.Thread] = []

    def poll(self, module: Module, arch: str) -> Artifact | str:
        """The artifact if it is ready; else a sentence, after starting the build if need be."""
        if self._process != os.getpid():
            self._reset()
        key = (module, arch)
        with self._guard:
            if key not in self._outcomes:
                self._outcomes[key] = self._ready_or_started(module, arch)
            outcome = self._outcomes[key]
        if outcome is None:
            return f"{module.name} is being built for {arch}"
        return outcome

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for every build that has been started, each for `timeout_s` seconds at most."""
        for thread in tuple(self._threads):
            thread.join(timeout_s)

    def _ready_or_started(self, module: Module, arch: str) -> Artifact | str | None:
        try:
            artifact = find(module, arch, self._settings)
        except BuildError as error:
            return str(error)
        if artifact is None:
            thread = threading.Thread(target=self._build, args=(module, arch), daemon=True)
            self._threads.append(thread)
            thread.start()
        return artifact

    def _build(self, module: Module, arch: str) -> None:
        outcome: Artifact | str
        with self._slots:
            try:
                outcome = load(module, arch, self._settings)
            except BuildError as error:
                outcome = str(error)
        with self._guard:
            self._outcomes[module, arch] = outcome
