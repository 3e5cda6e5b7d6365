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
        Arch(
            name="gfx942",
            device_type="cuda",
            wave_size=64,
            fp8_dtypes=(_FNUZ,),
            lds_bytes=65536,
            providers=_AMD_PROVIDERS,
            compute_units=304,
            tflops=2615,
            peak_gbs=6000,
            emulated_fp8=(_FN,),
        ),
        Arch(
            name="gfx950",
            device_type="cuda",
            wave_size=64,
            fp8_dtypes=(_FN,),
            lds_bytes=163840,
            providers=_AMD_PROVIDERS,
            compute_units=256,
            tflops=5033,
            peak_gbs=8000,
        ),
        Arch(
            name="sm_90",
            device_type="cuda",
            wave_size=32,
            fp8_dtypes=(_FN,),
            lds_bytes=232448,
            providers=_NVIDIA_PROVIDERS,
            compute_units=132,
            tflops=1979,
            peak_gbs=4800,
        ),
        Arch(
            name="cpu",
            device_type="cpu",
            wave_size=0,
            fp8_dtypes=(_FN, _FNUZ),
            lds_bytes=0,
            providers=("cpp", "torch"),
        ),
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
