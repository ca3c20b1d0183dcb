"""The table of names: what a configuration can call, and where it is. A new method is one line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS = {
    "supervised": "udas.methods.supervised:Supervised",
    "cyclegan": "udas.methods.cyclegan:CycleGAN",
    "udas": "udas.methods.udas:UDAS",
    "cycada": "udas.methods.cycada:CyCADA",
    "adaptsegnet": "udas.methods.adaptsegnet:AdaptSegNet",
    "minent": "udas.methods.minent:MinEnt",
    "advent": "udas.methods.advent:AdvEnt",
    "mrnet": "udas.methods.mrnet:MRNet",
    "rectified": "udas.methods.rectified:Rectified",
    "fda": "udas.methods.fda:FDA",
    "dacs": "udas.methods.dacs:DACS",
    "proda": "udas.methods.proda:ProDA",
    "distil": "udas.methods.distil:Distil",
    "region_mix": "udas.methods.region_mix:RegionMix",
    "dldm": "udas.methods.dldm:DLDM",
    "gct": "udas.methods.gct:GCT",
    "pseudoseg": "udas.methods.pseudoseg:PseudoSeg",
    "cutmixseg": "udas.methods.cutmixseg:CutMixSeg",
    "fixmatch": "udas.methods.fixmatch:FixMatch",
    "unimatch": "udas.methods.unimatch:UniMatch",
    "cct": "udas.methods.cct:CCT",
}


def load_method(name: str) -> Any:
    """The method class of that name, imported only now."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
