"""Host functions of `kernels/<language>/<family>.py` as providers of the ops of their name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from aiter_inductor.core.arch import arch_of
from aiter_inductor.core.dtypes import short_name
from aiter_inductor.core.errors import AiterInductorError
from aiter_inductor.core.op import Op, Use, Verdict, accept
from aiter_inductor.core.register import arch_of_call
from aiter_inductor.core.tuning import ByRows


def add_triton(
    made: Op,
    family: str,
    *,
    refuse: Verdict,
    decline: Verdict = accept,
    cede: Verdict = accept,
    config: str | None = None,
    archs: tuple[str, ...] | None = None,
) -> None:
    """Let `kernels/triton/<family>.py` provide `made`; Inductor sees and launches the kernels.

    Args:
        made: the op.
        family: name of the module.
        refuse, decline, cede: as of every provider.
        config: the class of its launch parameters, such as `triton.gemm_config.GemmConfig`, if
            tables hold them for this op.
        archs: the chips it is for, if not all that run Triton.
    """
    run, cls = _configured(made, "triton", family, config)
    made.provider(
        "triton",
        archs=archs,
        refuse=refuse,
        decline=decline,
        traceable=True,
        config=cls,
        cede=cede,
    )(run)


def add_hip(
    made: Op,
    family: str,
    *,
    refuse: Verdict,
    decline: Verdict = accept,
    cede: Verdict = accept,
) -> None:
    """Let `kernels/hip/<family>.py` provide `made`, built when first called."""
    _add_built(made, "hip", family, _with_instructions(refuse), decline, cede)


def add_cuda(
    made: Op,
    family: str,
    *,
    refuse: Verdict,
    decline: Verdict = accept,
    cede: Verdict = accept,
    config: str | None = None,
) -> None:
    """Let `kernels/cuda/<family>.py` provide `made` on sm_90, built when first called.

    Args:
        made, family, refuse, decline, cede, config: as of `add_triton`.
    """
    _add_built(made, "cuda", family, refuse, decline, cede, config)


def add_cpp(made: Op, family: str, *, refuse: Verdict, decline: Verdict = accept) -> None:
    """Let `kernels/cpp/<family>.py` provide `made` on the CPU, built when first called."""
    _add_built(made, "cpp", family, refuse, decline)


def add_vendor(
    made: Op,
    family: str,
    *,
    refuse: Verdict,
    decline: Verdict = accept,
    cede: Verdict = accept,
    archs: tuple[str, ...] | None = None,
) -> None:
    """Let `kernels/vendor/<family>.py` provide `made` by a library's own kernel."""
    run = _host_function(made, "vendor", family)
    made.provider("vendor", archs=archs, refuse=refuse, decline=decline, cede=cede)(run)


def _add_built(
    made: Op,
    language: str,
    family: str,
    refuse: Verdict,
    decline: Verdict,
    cede: Verdict = accept,
    config: str | None = None,
) -> None:
    """Add a provider that a compiler builds.

    A kernel that does not build is a warning with the compiler's lines, and the call goes to the
    next provider, or to the reference.
    """
    run, cls = _configured(made, language, family, config)

    def off(name: str) -> str | None:
        return language if name == language else None

    @functools.wraps(made.reference)
    def run_or_next(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except AiterInductorError as error:
            from aiter_inductor.core import jit  # not above: this runs at every call

            if not isinstance(error, jit.BuildError):
                raise
            jit.warn_once(f"{made.name} does not run in {language}: {error}")
            kwargs.pop("config", None)
            inputs = made.bind(*args, **kwargs)
            use = Use(arch_of_call(inputs), disabled=off)
            other = made.select(made.problem(**inputs), use).provider
            return (made.reference if other is None else other.run)(*args, **kwargs)

    verdict = _needs_compiler(refuse)
    made.provider(language, refuse=verdict, decline=decline, cede=cede, config=cls)(run_or_next)


def _host_function(made: Op, language: str, family: str) -> Callable[..., Any]:
    module = f"{language}.{family}"

    @functools.wraps(made.reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        return _attribute(module, made.name)(*args, **kwargs)

    return run


def _attribute(module: str, name: str) -> Any:
    return getattr(_kernels(module), name)


@functools.cache
def _kernels(module: str) -> ModuleType:
    """Imported when first called, and found in a tenth of the 1 µs that importing again takes."""
    return importlib.import_module(f"aiter_inductor.kernels.{module}")


def _configured(
    made: Op, language: str, family: str, config: str | None
) -> tuple[Callable[..., Any], Callable[[], type] | None]:
    """The host function, and what gives the class of its launch parameters, None without any.

    Where it has some, it is called with those that the op's table has for this provider.
    """
    run = _host_function(made, language, family)
    if config is None:
        return run, None
    assert made.tables is not None
    table = ByRows(made.tables, {language: run}, arch_of)

    @functools.wraps(made.reference)
    def run_tuned(*args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            return table(*args, **kwargs)
        return run(*args, config=config, **kwargs)

    return run_tuned, functools.partial(_attribute, *config.rpartition(".")[::2])


def _with_instructions(refuse: Verdict) -> Verdict:
    """Refuse also to make an fp8 that the chip has no instructions for: HIP kernels use them."""

    def verdict(problem: Any, use: Use) -> str | None:
        out = getattr(problem, "out_dtype", None)
        if out in use.arch.emulated_fp8:
            known = " and ".join(map(short_name, use.arch.fp8_dtypes))
            return f"{use.arch.name} converts to {known}, not to {short_name(out)}"
        return refuse(problem, use)

    return verdict


def _needs_compiler(refuse: Verdict) -> Verdict:
    def verdict(problem: Any, use: Use) -> str | None:
        arch = "host" if use.arch.name == "cpu" else use.arch.name
        return refuse(problem, use) or _compiler_missing(arch)

    return verdict


@functools.cache
def _compiler_missing(arch: str) -> str | None:
    """Why no source can be built for `arch` here, or None."""
    from aiter_inductor.core import jit

    try:
        jit.find_compiler(arch, jit.default_settings())
    except jit.NoCompilerError as error:
        return str(error)
    return None
