"""A kernel that runs as AMD machine code on this machine's CPU, in the simulator."""

from __future__ import annotations

from typing import Any

from aiter_inductor.core import jit
from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.core.launch.signature import KernelSignature


class SimulationUnavailableError(AiterInductorError, RuntimeError):
    """A code object that came without the assembly text that findings refer to."""


class SimulatedKernel:
    """Stands in for `Kernel`: the same launch, executed by `cdnasim` with every check on."""

    def __init__(self, artifact: jit.Artifact, signature: KernelSignature) -> None:
        """Load the code object and its listing.

        Raises:
            CorruptEntryError: if either is not what was built.
            SimulationUnavailableError: if the compiler left no listing.
        """
        from cdnasim import load

        listing = artifact.listing()
        if listing is None:
            raise SimulationUnavailableError(
                f"{artifact.path.name} was built by {artifact.compiler} without a listing"
            )
        self._kernel = load(listing, artifact.read(), arch=artifact.arch, name=signature.name)

    def launch(self, grid: Any, block: Any, shared_bytes: int, *arguments: Any) -> None:
        """Execute on CPU tensors.

        Raises:
            SimulationError: naming the source line of an access out of bounds, a race, a missing
                wait or another defect.
        """
        sizes = (value if isinstance(value, tuple) else (value,) for value in (grid, block))
        grid, block = sizes
        self._kernel.launch(grid, block, list(arguments), shared_bytes=shared_bytes)
