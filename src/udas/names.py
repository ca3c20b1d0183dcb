"""The table of names: what a configuration can call, and where it is. A new method is one line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS = {
    "supervised": "udas.methods.supervised:Supervised",
    "cyclegan": "udas.methods.cyclegan:CycleGAN",
    "udas": "udas.methods.udas:UDAS",
}


def load_method(name: str) -> Any:
    """The method class of that name, imported only now."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
