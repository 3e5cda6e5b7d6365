"""A kernel that can be called: its code object on every device that asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiter_inductor.core import jit
from aiter_inductor.core.arch import KNOWN
from aiter_inductor.core.code_object import CodeObject, CodeObjectError
from aiter_inductor.core.launch.native import launcher_class
from aiter_inductor.core.launch.runtime import (
    CudaRuntime,
    HostRuntime,
    Runtime,
    RuntimeLibraryError,
    runtime_of,
)
from aiter_inductor.core.launch.signature import KernelSignature

_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_THREADS = 1024
_DEFAULT_LDS_BYTES = 65536


class Kernel:
    """One kernel of a built module.

    `kernel(grid, block, shared_bytes, *arguments)` launches it on the device of its tensors, on
    the caller's current stream; the code object is loaded once per device, on the first launch
    there. Sizes are ints or tuples of up to three.
    """

    def __init__(
        self,
        artifact: jit.Artifact,
        signature: KernelSignature,
        settings: jit.JitSettings,
        runtime: Runtime | None = None,
        launcher: type[Any] | None = None,
    ) -> None:
        """Verify the artifact and check the signature against what the compiler recorded.

        Args:
            runtime: None takes the one for the artifact's architecture.
            launcher: None takes the C launcher, or its twin where that cannot be built.

        Raises:
            CorruptEntryError: if the artifact is not the one that was built.
            CodeObjectError: if it does not hold such a kernel.
            RuntimeLibraryError: if there is no runtime library.
        """
        self.artifact = artifact
        self.signature = signature
        self._content = artifact.read()
        max_threads, static_bytes = _MAX_THREADS, 0
        if artifact.arch == "host":
            runtime = runtime or HostRuntime(artifact.path)
        else:
            facts = _facts(self._content, artifact, signature)
            max_threads = min(facts.max_threads or _MAX_THREADS, _MAX_THREADS)
            static_bytes = facts.lds_bytes
            runtime = runtime or runtime_of(artifact.arch)
        known = KNOWN.get(artifact.arch)
        lds_bytes = known.lds_bytes if known else _DEFAULT_LDS_BYTES
        self._max_shared_bytes = max(lds_bytes - static_bytes, 0)
        self._runtime = runtime
        self.launch = (launcher or launcher_class(settings))(
            name=signature.name,
            parameters=_described(signature),
            max_grid=_MAX_GRID,
            max_items_x=2**32 - 1 if artifact.arch.startswith("gfx") else 0,
            max_threads=max_threads,
            max_shared_bytes=self._max_shared_bytes,
            launch_address=runtime.launch_address,
            early_address=runtime.early_address if signature.waits else 0,
            device_address=runtime.device_address,
            replace_address=runtime.replace_address,
            end_marker=runtime.end_marker,
            load=self._load,
            stream_of=runtime.stream_of,
            enter=runtime.enter,
            fail=runtime.fail,
        )

    def __call__(self, grid: Any, block: Any, shared_bytes: int, *arguments: Any) -> None:
        """Launch; `kernel.launch` is the same without this frame."""
        self.launch(grid, block, shared_bytes, *arguments)

    def clusters_side_by_side(
        self, sizes: Iterable[int], threads: int, shared_bytes: int
    ) -> tuple[int, ...]:
        """For each size in blocks, how many clusters the current device holds at once.

        Raises:
            RuntimeLibraryError: if the runtime is not CUDA's.
        """
        if not isinstance(self._runtime, CudaRuntime):
            raise RuntimeLibraryError(f"{type(self._runtime).__name__} knows no clusters")
        ask, function = self._runtime.clusters_side_by_side, self._load(0)
        return tuple(ask(function, size, threads, shared_bytes) for size in sizes)

    def _load(self, _device: int, /) -> int:
        return self._runtime.load(self._content, self.signature.name, self._max_shared_bytes)


def _described(signature: KernelSignature) -> tuple[tuple[str, str, Any, int, int], ...]:
    return tuple(
        (parameter.name, parameter.letter, parameter.dtype, parameter.align, offset)
        for parameter, offset in zip(signature.parameters, signature.offsets, strict=True)
    )


def _facts(content: bytes, artifact: jit.Artifact, signature: KernelSignature) -> Any:
    kernels = CodeObject.parse(content, artifact.arch).kernels
    if signature.name not in kernels:
        raise CodeObjectError(
            f"{artifact.path.name} holds {', '.join(kernels) or 'no kernel'}, not {signature.name}"
        )
    facts = kernels[signature.name]
    if facts.kernarg_bytes and facts.kernarg_bytes < signature.size_bytes:
        raise CodeObjectError(
            f"{signature.name} reads {facts.kernarg_bytes} bytes of arguments, but "
            f"{signature.size_bytes} are declared"
        )
    return facts
