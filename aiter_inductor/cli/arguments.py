"""Kinds of arguments that several commands take; argparse tells a mistake in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def positive(text: str) -> int:
    """A count of at least 1."""
    if (found := not_negative(text)) == 0:
        raise argparse.ArgumentTypeError("0 is not a positive integer")
    return found


def not_negative(text: str) -> int:
    """A count of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def new_file(text: str) -> Path:
    """A file that can be written once there is something to write."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a folder that exists")
    return path


def device_here(text: str) -> str:
    """A device of this machine."""
    if text == "cpu" or (text == "cuda" and torch.cuda.is_available()):
        return text
    here = "cpu or cuda" if torch.cuda.is_available() else "cpu, and torch sees no GPU"
    raise argparse.ArgumentTypeError(f"{text!r} is not {here}")
