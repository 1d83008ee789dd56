"""``LayerState``: what an ``SVDLinear`` keeps through a cast, a move, a copy and a state_dict, and what it refuses to load.

A state_dict is unmerged. Initial factors and what the method remembers are never cast. A frozen factor and its initial value are
one tensor, which is in the state_dict once. What the method derives of a seed is not in it at all. Layer: below ``nn``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdkern.fingerprint import digest_tensor, sha256
from svdkern.methods import Method

FACTORS = ("u", "sigma", "v")
_NEVER_CAST = ("u0", "sigma0", "v0", "scale0")


class LayerState(nn.Module):
    """The part of ``SVDLinear`` that PyTorch calls when a module's tensors are saved, loaded, cast, moved or copied."""

    in_features: int
    out_features: int
    config: Method
    merged: bool
    base_dtype: torch.dtype
    fingerprint: Tensor | None
    kept: Tensor | None

    @property
    def rank(self) -> int:
        """See ``SVDLinear``, as for the next ones."""
        raise NotImplementedError

    @property
    def unmerged_residual(self) -> Tensor | None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def _kept_copy(self, what: str) -> Tensor | None:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        kept = self._kept_copy("state_dict") if self.merged else None
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (*(f"{factor}0" for factor in self._own_starts()), *self.config.derived):
            del destination[prefix + name]
        if kept is not None:
            destination[prefix + "residual"] = kept if keep_vars else kept.detach()
        elif self.merged:
            del destination[prefix + "residual"]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """A state_dict is unmerged, so the layer is unmerged by loading one."""
        state = {name: state_dict[prefix + name] for name in self.config.state if prefix + name in state_dict}
        if (reason := self.config.refusal(self, state)) is not None:  # type: ignore[arg-type]
            error_msgs.append(f"{prefix.rstrip('.') or 'this layer'}: {reason}")
            return
        if self.merged and self.kept is None and self.config.has_residual and prefix + "residual" in state_dict:
            self.merged = False  # what was dropped comes back with the state_dict
        elif self.merged:
            self.unmerge()
        own = []  # the factors that are their own initial values there
        for factor in FACTORS:
            start, given = self._buffers[f"{factor}0"], state_dict.get(f"{prefix}{factor}0")
            if start is not None and given is not None:  # rounded initial factors would rebuild another residual
                self._buffers[f"{factor}0"] = torch.empty_like(start, dtype=given.dtype)
            elif start is not None and factor not in self.config.trains and prefix + factor in state_dict:
                self._buffers[f"{factor}0"] = None
                own.append(factor)
        for name, shape in self.config.shapes(self.in_features, self.out_features, self.rank).items():
            given, held = state_dict.get(prefix + name), getattr(self, name)
            if -1 in shape and given is not None and given.shape != held.shape and given.dim() == held.dim():
                setattr(self, name, nn.Parameter(held.new_empty(given.shape), requires_grad=held.requires_grad))
        with self._without_derived():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        for factor in own:
            held, given = getattr(self, factor).detach(), state_dict[prefix + factor].detach()
            self._buffers[f"{factor}0"] = held if held.dtype == given.dtype else given.to(held.device, copy=True)
        self.config.settle(self)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerState:
        old = None
        if self.fingerprint is not None and (not self.merged or self.kept is not None):
            old = None if self.unmerged_residual is None else self.unmerged_residual.detach()
        own, rank = self._own_starts(), self.rank
        before = {name: self._buffers[name] for name in ("scale", *_NEVER_CAST, *self.config.state)}
        with self._without_derived() as derived:
            super()._apply(fn, recurse)
            self._move_derived(derived, fn, rank)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is None or after is None or after is buffer:
                continue
            if name == "scale":  # keeps its value through to_empty and never goes to meta
                self._buffers[name] = buffer if after.is_meta else buffer.to(after.device)
            elif after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        for factor in own:
            held, start = getattr(self, factor), self._buffers[f"{factor}0"]
            if start is not None and held.dtype == start.dtype:
                self._buffers[f"{factor}0"] = held.detach()
        if old is not None and (new := self.unmerged_residual) is not None:
            self._recast_fingerprint(old, new.detach())
        return self

    def _move_derived(self, derived: dict[str, nn.Parameter], fn: Callable[[Tensor], Tensor], rank: int) -> None:
        """To the device where ``fn`` puts things; from meta they are made."""
        for name, parameter in derived.items():
            device = fn(parameter.detach().new_empty(0)).device
            if device == parameter.device:
                continue
            if parameter.is_meta:
                made = self.config.derive(self.in_features, self.out_features, rank, parameter.dtype, device)[name]
                derived[name] = nn.Parameter(made, requires_grad=False)
            elif device.type == "meta":
                derived[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
            else:
                parameter.data = parameter.data.to(device)  # the layers that share it go on sharing it

    def _recast_fingerprint(self, old: Tensor, new: Tensor) -> None:
        """Follow a cast of the residual from the dtype it was computed in, which loading an adapter can repeat.

        A residual that differs from its fingerprint for another reason keeps differing from it: saving refuses it.
        """
        if new.dtype == old.dtype or old.dtype != self.base_dtype or old.is_meta or new.is_meta:
            return
        assert self.fingerprint is not None
        if bytes(self.fingerprint[1].tolist()) == sha256(old):
            self.fingerprint[1].copy_(digest_tensor(sha256(new)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a copy a frozen factor and its initial value are one tensor again."""
        super().__setstate__(state)
        for factor in FACTORS:
            held, start = self._parameters.get(factor), self._buffers.get(f"{factor}0")
            if held is None or start is None or factor in self.config.trains or held.is_meta:
                continue
            if held.dtype == start.dtype and torch.equal(held, start):
                self._buffers[f"{factor}0"] = held.detach()

    def _own_starts(self) -> list[str]:
        """The factors that are one tensor with what was cut out: frozen ones that were not cast."""
        return [
            factor
            for factor in FACTORS
            if factor not in self.config.trains
            and (held := self._parameters.get(factor)) is not None
            and (start := self._buffers[f"{factor}0"]) is not None
            and held.dtype == start.dtype
            and held.data_ptr() == start.data_ptr()
        ]

    @contextmanager
    def _without_derived(self) -> Iterator[dict[str, nn.Parameter]]:
        """Within it the layer has no derived tensors; those of the dictionary are put in their places at its end."""
        held = {name: parameter for name in self.config.derived if (parameter := self._parameters[name]) is not None}
        for name in held:
            self._parameters[name] = None  # the order of the parameters stays
        try:
            yield held
        finally:
            self._parameters.update(held)
