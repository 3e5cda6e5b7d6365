"""The chips this package plans for, and what each can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from aiter_inductor.core.errors import UnknownTargetError


@dataclass(frozen=True)
class Arch:
    """One chip family.

    Attributes:
        name: `gfx942`, `gfx950`, `sm_90`, `cpu`, or the name of a chip that was only detected.
        device_type: torch's device type, `cuda` for AMD and NVIDIA alike.
        wave_size: lanes that execute together; 0 on a CPU.
        fp8_dtypes: the fp8 formats its conversion instructions produce.
        lds_bytes: shared memory one workgroup may use.
        providers: technologies whose kernels it can run, in no order of preference.
        compute_units: CUs or SMs; of a chip that is not here, those of the usual model.
        tflops: of its data sheet, dense, with 8-bit operands; 0 where no table is kept.
        peak_gbs: GB/s of its memory, by the data sheet; 0 where no table is kept.
        emulated_fp8: formats that compiled code converts to and from by integer operations.
        card: the product's name, where one is here: H100 and H200 are both sm_90.
    """

    name: str
    device_type: str
    wave_size: int
    fp8_dtypes: tuple[torch.dtype, ...]
    lds_bytes: int
    providers: tuple[str, ...]
    compute_units: int = 0
    tflops: float = 0.0
    peak_gbs: float = 0.0
    emulated_fp8: tuple[torch.dtype, ...] = ()
    card: str = ""

    def peak_tflops(self, dtype: torch.dtype) -> float:
        """The most that products of this dtype can reach; 0 if it is not known."""
        return self.tflops / dtype.itemsize

    def __str__(self) -> str:
        return self.name


_AMD_PROVIDERS = ("triton", "hip", "ck", "asm", "vendor", "torch")
_NVIDIA_PROVIDERS = ("cuda", "triton", "hip", "vendor", "torch")

_FN, _FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz

KNOWN = {
    arch.name: arch
    for arch in (
        Arch("gfx942", "cuda", 64, (_FNUZ,), 65536, _AMD_PROVIDERS, 304, 2615, 6000, (_FN,)),
        Arch("gfx950", "cuda", 64, (_FN,), 163840, _AMD_PROVIDERS, 256, 5033, 8000),
        Arch("sm_90", "cuda", 32, (_FN,), 232448, _NVIDIA_PROVIDERS, 132, 1979, 4800),
        Arch("cpu", "cpu", 0, (_FN, _FNUZ), 0, ("cpp", "torch")),
    )
}


def arch_named(name: str) -> Arch:
    """The chip called `name`.

    Raises:
        UnknownTargetError: if no chip of that name is known.
    """
    if name not in KNOWN:
        raise UnknownTargetError(name, KNOWN)
    return KNOWN[name]


def arch_of(device: torch.device) -> Arch:
    """The chip behind `device`; one that is not in `KNOWN` gets no providers, never an error."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return _detect(index)
    if device.type == "cpu":
        return KNOWN["cpu"]
    return Arch(device.type, device.type, 0, (), 0, ())


@lru_cache
def _detect(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    found = KNOWN.get(name) or Arch(name, "cuda", properties.warp_size, (), 0, ())
    return replace(found, compute_units=properties.multi_processor_count, card=properties.name)
