"""The linear layers of models, as pairs of output and input features, to tune for."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from aiter_inductor.core.errors import OptionValueError, UnknownOptionError
from aiter_inductor.core.tuning import SHIPPED

LISTS = SHIPPED / "linears.csv"
"""Of models by name: columns model, linear, N, K. As their checkpoints keep them; where serving
engines join layers into one, that one too."""


@dataclass(frozen=True)
class Linear:
    """`out[M, N] = x[M, K] @ weight[N, K].T`; M is 0 where any is meant."""

    N: int
    K: int
    M: int = 0


def models() -> tuple[str, ...]:
    """The models whose linears are listed."""
    return tuple(dict.fromkeys(row["model"] for row in _rows(LISTS)))


def linears_of(model: str) -> list[Linear]:
    """The different linears of a listed model, of `all`, or of a transformers configuration.

    Args:
        model: a name of `models()`, `all`, or the path of a `config.json` or of its folder.

    Raises:
        UnknownOptionError: for a name that is neither listed nor a path.
        OptionValueError: for a path to something else.
    """
    if Path(model).exists():
        return _of_configuration(Path(model))
    if model != "all" and model not in models():
        raise UnknownOptionError(model, models())
    chosen = (row for row in _rows(LISTS) if model in ("all", row["model"]))
    return list(dict.fromkeys(Linear(int(row["N"]), int(row["K"])) for row in chosen))


def read_shapes(path: Path) -> list[Linear]:
    """The shapes of a CSV file with columns N and K, and perhaps M.

    Raises:
        OptionValueError: for a file without them, or a size that is no positive integer.
    """
    try:
        rows = _rows(path)
    except (OSError, UnicodeDecodeError):
        rows = []
    if not rows:
        raise OptionValueError("--shapes", str(path), "a CSV file with columns N and K")
    found = []
    for line, row in enumerate(rows, 2):
        sizes = {name: row.get(name) or "" for name in ("N", "K", "M")}
        for name, text in sizes.items():
            if (text or name != "M") and (not text.isdigit() or int(text) < 1):
                raise OptionValueError(f"{path}:{line}: {name}", text, "a positive integer")
        found.append(Linear(int(sizes["N"]), int(sizes["K"]), int(sizes["M"] or 0)))
    return found


def _of_configuration(path: Path) -> list[Linear]:
    """Every `nn.Linear` of the model but its head, found on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path if path.is_dir() else path.parent)
    except (OSError, ValueError) as error:
        raise OptionValueError("--model", str(path), "a transformers configuration") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return list(dict.fromkeys(Linear(layer.out_features, layer.in_features) for layer in layers))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
