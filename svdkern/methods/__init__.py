"""One file for each published method, and the list of them.

To add a method: a file with a frozen dataclass derived from ``Method``, and its class in ``METHODS``.
"""

from __future__ import annotations

import difflib

from svdkern.methods.codyra import CoDyRA
from svdkern.methods.corda import CorDA
from svdkern.methods.diffora import DiffoRA
from svdkern.methods.fedsvd import FedSVD
from svdkern.methods.fila import FILA
from svdkern.methods.kasa import KaSA
from svdkern.methods.kind import KIND
from svdkern.methods.lora import LoRA
from svdkern.methods.lora_sb import LoRASB
from svdkern.methods.lora_xs import LoRAXS
from svdkern.methods.method import Cut, Factors, Method, Start
from svdkern.methods.milora import MiLoRA
from svdkern.methods.osf import OSF
from svdkern.methods.pissa import PiSSA
from svdkern.methods.randlora import RandLoRA
from svdkern.methods.salt import SALT
from svdkern.methods.smora import SMoRA
from svdkern.methods.soma import SoMA
from svdkern.methods.sorsa import SORSA
from svdkern.methods.sst import SST
from svdkern.methods.svfit import SVFit

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRA, PiSSA, SORSA, KaSA, SVFit, SALT, SoMA, MiLoRA, CorDA, LoRAXS, LoRASB, SST, FedSVD, RandLoRA, KIND, CoDyRA, SMoRA,
        DiffoRA, FILA, OSF,
    )
}  # fmt: skip

__all__ = [
    "CoDyRA",
    "CorDA",
    "Cut",
    "DiffoRA",
    "FILA",
    "Factors",
    "FedSVD",
    "KIND",
    "KaSA",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "METHODS",
    "Method",
    "MiLoRA",
    "OSF",
    "PiSSA",
    "RandLoRA",
    "SALT",
    "SMoRA",
    "SORSA",
    "SST",
    "SVFit",
    "SoMA",
    "Start",
    "method_named",
]


def method_named(method: str | Method) -> Method:
    """The configuration for a name (with the published defaults), or the configuration itself.

    Raises:
        ValueError: no method has this name; the message lists them, the nearest first.
        TypeError: neither a name nor a method.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method is {type(method).__name__}, expected a name ({', '.join(METHODS)}) or a Method")
    found = METHODS.get(method.lower())
    if found is None:
        near = difflib.get_close_matches(method.lower(), METHODS, len(METHODS), 0.0)
        raise ValueError(f"method is {method!r}, expected one of {', '.join(near)}")
    return found()
