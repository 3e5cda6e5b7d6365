"""A Triton driver whose device is the simulator: kernels launched on CPU tensors run as AMD code.

The launch goes through Triton's own path: it specialises on the real arguments, compiles for the
chip and caches, as it does on that chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from aiter_inductor.core.arch import arch_named
from aiter_inductor.core.code_object import CodeObject

MAX_THREADS = 1024


@dataclass(frozen=True)
class Launched:
    """One launch that was simulated.

    Attributes:
        name: of the `@triton.jit` function.
        arch: it was compiled for.
        listing: its assembly text.
        grid: programs along x, y and z.
        threads: work-items a program.
        shared_bytes: LDS a program.
        arguments: tensors and numbers passed, in order.
        run: what it did; `cdnasim.Run`.
    """

    name: str
    arch: str
    listing: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]
    run: Any


@dataclass(frozen=True)
class Compiled:
    """A launch that was compiled for, and not made.

    Attributes:
        name: of the `@triton.jit` function.
        binary: its code object.
        listing: the assembly text of it.
        threads: work-items a program.
        shared_bytes: LDS a program.
    """

    name: str
    binary: bytes
    listing: str
    threads: int
    shared_bytes: int


@contextmanager
def compiling(arch: str) -> Iterator[list[Compiled]]:
    """Within, Triton kernels are compiled for `arch` and not run; tensors may be meta tensors.

    Yields:
        The kernels so far, in order of their launches.

    Raises:
        UnknownTargetError: for a chip that is not known.
    """
    compiled: list[Compiled] = []

    def keep(launch: _Launch) -> None:
        code = launch.code
        compiled.append(
            Compiled(code.name, code.binary, code.listing, launch.threads, launch.shared_bytes)
        )

    with _driving(SimulatorDriver(arch, keep)):
        yield compiled


@contextmanager
def simulating(arch: str) -> Iterator[list[Launched]]:
    """Within, Triton kernels on CPU tensors run as the machine code of `gfx942` or `gfx950`.

    Each launch is executed by `cdnasim` with every check on and raises `SimulationError` for what
    one finds. Host functions ask torch whether it is a ROCm build to choose the number of waves;
    within, it is one.

    Yields:
        The launches so far, in order.

    Raises:
        UnknownTargetError: for a chip that is not known.
    """
    launched: list[Launched] = []

    def run(launch: _Launch) -> None:
        done = launch.code.loaded.launch(
            launch.grid, (launch.threads,), launch.arguments, shared_bytes=launch.shared_bytes
        )
        launched.append(
            Launched(
                name=launch.name,
                arch=arch,
                listing=launch.code.listing,
                grid=launch.grid,
                threads=launch.threads,
                shared_bytes=launch.shared_bytes,
                arguments=launch.arguments,
                run=done,
            )
        )

    with _driving(SimulatorDriver(arch, run)):
        yield launched


@dataclass(frozen=True, eq=False)
class _Code:
    name: str
    arch: str
    binary: bytes
    listing: str

    @cached_property
    def loaded(self) -> Any:
        """The kernel in the simulator."""
        import cdnasim

        return cdnasim.load(self.listing, self.binary, arch=self.arch, name=self.name)


@dataclass(frozen=True)
class _Launch:
    name: str
    code: _Code
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]


@contextmanager
def _driving(driver: SimulatorDriver) -> Iterator[None]:
    before, hip = triton.runtime.driver._active, torch.version.hip
    knobs.runtime.kernel_load_start_hook.add(driver.remember_listing)
    triton.runtime.driver.set_active(driver)
    torch.version.hip = "simulated"
    try:
        yield
    finally:
        torch.version.hip = hip
        triton.runtime.driver.set_active(before)
        knobs.runtime.kernel_load_start_hook.remove(driver.remember_listing)


class SimulatorDriver(DriverBase):
    """What Triton asks of a driver, answered for a simulated chip; `take` gets the launches."""

    def __init__(self, arch: str, take: Callable[[_Launch], None]) -> None:
        super().__init__()
        self.arch = arch_named(arch)
        self.take = take
        self.utils = self
        self._listing = ""

    @classmethod
    def is_active(cls) -> bool:
        """Never by itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """The chip to compile for."""
        return GPUTarget("hip", self.arch.name, self.arch.wave_size)

    def get_current_device(self) -> str:
        """The key under which a kernel keeps what it compiled."""
        return f"simulated {self.arch.name}"

    def get_current_stream(self, _device: str) -> int:
        """There is only one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors lie."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Asked for by launchers that are compiled, which this one's is not."""
        raise NotImplementedError(f"the simulator's launcher has no C++ type for {ty}")

    def get_benchmarker(self) -> Callable[..., Any]:
        """Asked for by the autotuner, which would measure the simulator."""
        raise NotImplementedError("the simulator has no clock to tune by")

    def get_device_properties(self, _device: str) -> dict[str, int]:
        """Limits of the chip, as Triton names them."""
        return {"max_shared_mem": self.arch.lds_bytes}

    def remember_listing(
        self, _module: Any, _function: Any, _name: str, files: Any, _key: str
    ) -> None:
        """Triton's hook before it loads a kernel: keep the assembly text it was made from."""
        (text,) = (path for file, path in files.items() if file.endswith(".amdgcn"))
        self._listing = Path(text).read_text()

    def load_binary(
        self, name: str, binary: bytes, _shared_bytes: int, _device: str
    ) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spills and threads of one code object."""
        facts = CodeObject.parse(binary, self.arch.name).kernels[name]
        code = _Code(name, self.arch.name, binary, self._listing)
        return code, code, facts.vgprs, facts.spills, MAX_THREADS

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches a kernel with the signature of `source`."""
        return partial(_launch, source, metadata)


def _launch(
    source: Any,
    metadata: Any,
    grid_x: int,
    grid_y: int,
    grid_z: int,
    stream: int,
    function: Any,
    packed_metadata: Any,
    launch_metadata: Any,
    enter_hook: Any,
    exit_hook: Any,
    *values: Any,
) -> None:
    """Triton's launcher protocol; `values` are all parameters, those compiled in included."""
    grid = (grid_x, grid_y, grid_z)
    if 0 in grid:
        return
    kinds = source.signature.values()
    passed = tuple(v for v, kind in zip(values, kinds, strict=True) if kind != "constexpr")
    threads = metadata.num_warps * metadata.warp_size
    # Triton keeps a kernel and its launcher for as long as the process lives: the launch belongs to
    # the driver of today.
    triton.runtime.driver.active.take(
        _Launch(
            name=source.fn.__name__,
            code=function,
            grid=grid,
            threads=threads,
            shared_bytes=metadata.shared,
            arguments=passed,
        )
    )
