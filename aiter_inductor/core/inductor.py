"""Everything this package asks of Inductor and Dynamo that torch does not promise to keep.

One file, so that a new torch version is read against one list: option tables, the fake mode of a
captured graph, cudagraph resets, and the graph pass whose `uuid` keys Inductor's caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from aiter_inductor.core.config import OPTION_NAMES, tuned_dirs
from aiter_inductor.core.errors import OptionValueError, UnknownOptionError
from aiter_inductor.core.graph import value
from aiter_inductor.core.op import OPS

_HOOK = "post_grad_custom_pre_pass"
_DIRECT = "aiter_inductor_direct"


def split_options(
    mode: str | None, options: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """`(this backend's options, Inductor's config patches)` with `mode` expanded.

    A string backend gets neither from torch.compile.

    Raises:
        UnknownOptionError: for an option that Inductor does not have.
        OptionValueError: for an unknown mode.
    """
    import torch._inductor as inductor

    modes = inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise OptionValueError("mode", mode, "one of " + ", ".join(modes))
    ours: dict[str, object] = {}
    patches: dict[str, object] = dict(modes[mode]) if mode else {}
    known = None
    for name, given in options.items():
        if name.startswith("aiter."):
            ours[name] = given
            continue
        known = known or set(inductor.list_options())
        if (plain := name.replace("-", "_")) not in known:
            raise UnknownOptionError(name, {*known, *OPTION_NAMES})
        patches[plain] = given
    return ours, patches


def uses_cuda_graphs(patches: Mapping[str, object]) -> bool:
    """Whether Inductor, with these config patches, is to capture what it compiles."""
    from torch._inductor import config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, object]
) -> Callable[..., Any]:
    """Hand the graph to Inductor, with caches keyed by what this package's ops mean."""
    from torch._inductor.compile_fx import compile_fx

    patches = dict(patches)
    if any(_is_ours(node) for module in _graph_modules(gm) for node in module.graph.nodes):
        patches[_HOOK] = _keyed_pass(patches.get(_HOOK))
        _call_directly(made.overload for made in OPS.values())
    compiled: Callable[..., Any] = compile_fx(
        gm, list(example_inputs), config_patches=patches or None
    )
    return compiled


def reset() -> None:
    """What `torch._dynamo.reset()` does for Inductor and not for other backends."""
    import torch._inductor.config as inductor_config

    if inductor_config.triton.cudagraphs or torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


@contextlib.contextmanager
def captured_by(
    backend: Callable[..., Any], model: Callable[..., Any], dynamic: bool | None
) -> Iterator[Callable[..., Any]]:
    """`model` compiled with `backend`, beside whatever the program itself compiled of it.

    Dynamo counts compilations by code and stops, running eagerly, after eight. Those of a capture
    are kept apart where torch can (2.13); elsewhere each makes room for the one that it leaves.
    """
    from torch._dynamo import config

    apart: Any = {"isolate_recompiles": True} if _can_isolate() else {}
    with config.patch(
        recompile_limit=config.accumulated_recompile_limit, fail_on_recompile_limit_hit=True
    ):
        yield torch.compile(model, backend=backend, dynamic=dynamic, **apart)
    if not apart:
        config.recompile_limit += 1


def _can_isolate() -> bool:
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def mode_options(mode: str | None) -> dict[str, object]:
    """What torch.compile's `mode` stands for: it takes a mode or options, not both."""
    import torch._inductor as inductor

    return dict(inductor.list_mode_options(mode)) if mode else {}


@contextlib.contextmanager
def many_compilations() -> Iterator[None]:
    """Within, one model may be compiled in more ways than the eight that Dynamo stops after."""
    from torch._dynamo import config

    with config.patch(recompile_limit=config.accumulated_recompile_limit):
        yield


def recompile(gm: fx.GraphModule) -> None:
    """Regenerate the code of every changed graph of `gm`."""
    for module in _graph_modules(gm):
        module.recompile()


def fake_mode_of(graph: fx.Graph) -> contextlib.AbstractContextManager[Any]:
    """The fake mode under which Dynamo made the graph's values; a null context if it made none.

    Not the tracing context's: Dynamo replaces that one before it calls a backend.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    for node in graph.nodes:
        if isinstance(found := value(node), FakeTensor):
            mode: contextlib.AbstractContextManager[Any] = found.fake_mode
            return mode
    return contextlib.nullcontext()


def is_frozen(node: fx.Node) -> bool:
    """Whether Inductor will compute when compiling what is made of `node` alone.

    With `torch._inductor.config.freezing`, and without gradients, Dynamo makes attributes of the
    graph of the parameters and buffers that it else passes as inputs.
    """
    import torch._inductor.config as inductor_config

    frozen = inductor_config.freezing and not torch.is_grad_enabled()
    return bool(frozen and node.op == "get_attr")


def frame_being_compiled() -> str:
    """Identity of the frame that Dynamo is compiling: the same on a restart or a recompilation."""
    return compilation().split("/")[0]


def compilation() -> str:
    """Identity of what Dynamo is compiling: the same on a restart, another on a recompilation."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    return "" if compile_id is None else str(compile_id)


def meaning_key() -> str:
    """A digest of everything that gives the ops their meaning: all sources, and all tables.

    Graph caches see an operator's name and arguments only; without this a second process would run
    the code that an older formula, kernel or tuned table produced.
    """
    return _digest((Path(__file__).parent.parent, *tuned_dirs()))


@lru_cache
def _digest(roots: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _call_directly(overloads: Iterable[torch._ops.OpOverload]) -> None:
    """Let generated code call opaque ops as functions of `core.direct`; see there."""
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    class DirectKernel(ir.FallbackKernel):  # type: ignore[misc]
        """An opaque call, by another name where the code around it is Python."""

        def codegen(self, wrapper: Any) -> None:
            if not V.graph.cpp_wrapper:
                wrapper.add_import_once(f"from aiter_inductor.core import direct as {_DIRECT}")
                name = self.op_overload.name().partition("::")[2]
                self.python_kernel_name = f"{_DIRECT}.{name}"
            super().codegen(wrapper)

    def lowered(overload: torch._ops.OpOverload) -> Callable[..., Any]:
        def handler(*args: Any, **kwargs: Any) -> Any:
            kernel = DirectKernel if kwargs.get("provider") else ir.FallbackKernel
            args, kwargs = _with_dtypes(overload, args, kwargs)
            return pytree.tree_map(_boxed, kernel.create(overload, *args, **kwargs))

        return handler

    for overload in overloads:
        if overload not in lowering.lowerings:
            tag = get_layout_constraint_tag(overload, with_default=True)
            constraint = lowering.tag_to_layout_constraint(tag)
            lowering.make_fallback(overload, layout_constraint=constraint, warn=False)
            lowering.lowerings[overload] = lowered(overload)


def _with_dtypes(
    overload: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with their dtypes spelled out: the dispatcher leaves its numbers for them."""
    parameters = overload._schema.arguments
    takes_dtype = {p.name for p in parameters if "ScalarType" in str(p.real_type)}

    def spelled(name: str, given: Any) -> Any:
        if name in takes_dtype and isinstance(given, int):
            return torch.ops.aten.empty.memory_format([0], dtype=given, device="meta").dtype
        return given

    positional = tuple(spelled(p.name, a) for p, a in zip(parameters, args, strict=False))
    return positional, {name: spelled(name, given) for name, given in kwargs.items()}


def _boxed(found: Any) -> Any:
    """A result as the lowerings of other ops take it."""
    from torch._inductor import ir

    return ir.TensorBox.create(found) if isinstance(found, ir.IRNode) else found


def _keyed_pass(existing: object) -> object:
    """A graph pass that runs the one already in the slot, and whose uuid includes ours."""
    import torch._inductor.config as inductor_config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    inner = existing if existing is not None else getattr(inductor_config, _HOOK)
    passes: list[Any] = (
        [] if inner is None else list(inner) if isinstance(inner, list | tuple) else [inner]
    )

    class MeaningKey(CustomGraphPass):  # type: ignore[misc]
        """Changes nothing itself."""

        def __call__(self, graph: fx.Graph) -> None:
            for each in passes:
                each(graph)

        def uuid(self) -> Any:
            keys = [meaning_key()]
            for each in passes:
                # A pass without a uuid makes Inductor bypass its cache; so must the composition.
                if not isinstance(each, CustomGraphPass) or not (key := each.uuid()):
                    return None
                keys.append(str(key))
            return tuple(keys)

    return MeaningKey()


def _graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", None) == "aiter_inductor"
