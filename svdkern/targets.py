"""Which modules of a model ``target_modules`` names, as PEFT reads it.

"all-linear": every ``nn.Linear`` but the output embedding. Another string: a regular expression that the whole module
path must match. A list: module paths, or their last parts (``q_proj`` matches ``layers.0.attn.q_proj``). Unlike PEFT,
every entry must match something.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

ALL_LINEAR = "all-linear"
Patterns = str | Iterable[str]


@dataclass
class Target:
    """One module, and every place where the model holds it."""

    module: nn.Module
    names: list[str]
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    def put(self, module: nn.Module) -> None:
        """Let every place hold ``module``."""
        for parent, attribute in self.places:
            setattr(parent, attribute, module)


def find_targets(model: nn.Module, target_modules: Patterns, exclude_modules: Patterns | None = None) -> list[Target]:
    """The modules named, in the model's order; a module that is used in several places comes once.

    Raises:
        ValueError: an entry matches nothing (the message has near matches), the list is empty, or all is excluded.
        TypeError: not a string or a list of strings.
    """
    everything = dict(model.named_modules(remove_duplicate=False))
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        chosen = _all_linear(model, everything)
    else:
        chosen = _matching(everything, target_modules, "target_modules")
    if exclude_modules is not None:
        excluded = _matching(everything, exclude_modules, "exclude_modules", may_be_empty=True)
        chosen = [name for name in chosen if name not in set(excluded)]
        if not chosen:
            raise ValueError(f"exclude_modules={exclude_modules!r} excludes everything that target_modules names")
    targets: dict[int, Target] = {}
    for name in chosen:
        targets.setdefault(id(everything[name]), Target(everything[name], [])).names.append(name)
    for name, module in everything.items():
        target = targets.get(id(module))
        if target is None:
            continue
        if not name:
            raise ValueError(f"the model itself is the {type(module).__name__} to adapt: use SVDLinear.from_linear")
        parent, _, attribute = name.rpartition(".")
        target.places.append((everything[parent], attribute))
        if name not in target.names:
            target.names.append(name)
    return list(targets.values())


def _all_linear(model: nn.Module, everything: dict[str, nn.Module]) -> list[str]:
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    for name, module in everything.items():
        if hasattr(module, "base_layer") and type(module).__module__.startswith("peft."):
            raise TypeError(
                f"{name} is adapted by PEFT already ({type(module).__name__}): merge_and_unload() the model first"
            )
    chosen = [
        name
        for name, module in everything.items()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not output
    ]
    if chosen:
        return chosen
    adapted = sum(_is_adapted(module) for module in model.modules())
    why = (
        f"its {adapted} linear layers are adapted already"
        if adapted
        else "it has no nn.Linear besides the output embedding"
    )
    raise ValueError(f"target_modules='all-linear' finds nothing in this {type(model).__name__}: {why}")


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (which need not be installed)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _is_adapted(module: nn.Module) -> bool:
    return type(module).__name__ == "SVDLinear"


def _matching(
    everything: dict[str, nn.Module], patterns: Patterns, argument: str, may_be_empty: bool = False
) -> list[str]:
    names = [name for name in everything if name]
    if isinstance(patterns, str):
        try:
            found = [name for name in names if re.fullmatch(patterns, name)]
        except re.error as error:
            raise ValueError(f"{argument}={patterns!r} is not a regular expression: {error}") from error
        if not found:
            as_list = (
                f"; as a list, [{patterns!r}] would match" if _by_name(names, patterns) else _near(names, patterns)
            )
            raise ValueError(
                f"{argument}={patterns!r} (a regular expression for the whole module path) matches nothing{as_list}"
            )
        return found
    entries = list(patterns)
    if not entries and not may_be_empty:
        raise ValueError(f"{argument} is empty")
    chosen: set[str] = set()
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{argument} has {entry!r}, expected module names")
        found = _by_name(names, entry)
        if not found:
            raise ValueError(f"{argument} has {entry!r}, which matches no module{_near(names, entry)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _by_name(names: list[str], entry: str) -> list[str]:
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _near(names: list[str], entry: str) -> str:
    candidates = dict.fromkeys([name.rpartition(".")[2] for name in names] + names)
    near = difflib.get_close_matches(entry, [c for c in candidates if not c.isdigit()], 3, 0.5)
    return f"; near matches: {', '.join(repr(name) for name in near)}" if near else ""
