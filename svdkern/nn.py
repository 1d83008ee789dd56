"""``SVDLinear``: a linear layer whose weight is a frozen residual plus a trained low-rank product.

Layer: above ``methods`` and ``functional``, below ``model``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svdkern.autocast import autocast_is_on, without_autocast
from svdkern.fingerprint import digest_tensor, sha256, sha256_together
from svdkern.frozen import linear
from svdkern.functional import svd_linear
from svdkern.initialisation import check_linear, initial_start, residual_of, scale_of
from svdkern.layer_state import LayerState
from svdkern.linalg.merged import effective_weight, merged_weight
from svdkern.methods import Cut, Factors, Method, Start, method_named

_READ_ONLY = (
    "weight of an SVDLinear is computed from its residual and factors and cannot be assigned: assign to residual, u, "
    "sigma or v, or merge() the layer and assign to residual"
)
_NO_COPY = (
    "the layer was merged with keep=False: the unmerged residual is gone, so {what} is not possible. Merge with keep=True, "
    "or save the adapter before merging"
)


class SVDLinear(LayerState):
    r"""A drop-in for ``nn.Linear`` with a low-rank adapter: ``y = x W_res + s ((x U) * sigma) V^T + b``.

    ``SVDLinear.from_linear`` makes one of an existing layer; ``svdkern.adapt`` does so for a whole model. This
    constructor makes what ``from_linear(nn.Linear(in_features, out_features, bias), rank, method)`` would; on
    ``device="meta"`` only the shapes, to load a state_dict into.

    Parameters: ``residual`` (N, K), frozen; ``u`` (K, r) on the input side; ``sigma`` (r,) or None; ``core`` (r, r) or
    None; ``v`` (N, r) on the output side; ``bias`` (N,) or None, frozen; and what else the method has
    (``config.shapes``; SST and KIND have no residual). Buffers: ``scale`` (0-d float32, not in the
    state_dict; ``layer.scale = 2.0`` writes into it); what the method remembers (``config.state``); for methods that
    change the residual also ``u0, sigma0, v0, scale0`` (the initial factors, from which a saved adapter rebuilds the
    residual) and ``fingerprint`` (SHA-256 of the original weight, of the residual and of the initial factors). Casting
    the module casts the parameters, never these buffers. A factor that is frozen is its own initial one: one tensor, once
    in the state_dict. Frozen tensors that the method makes of a seed (``config.derived``) are not in it, nor are they cast.

    ``weight`` is the *effective* weight, computed when it is read, differentiable in the factors.

    Equivalent to::

        layer.weight == layer.residual + layer.scale * layer.v @ torch.diag(layer.sigma) @ layer.u.t()
        layer(x) == torch.nn.functional.linear(x, layer.weight, layer.bias)

    Args:
        in_features, out_features, bias: K and N; whether there is a bias.
        rank: r, 0 <= r <= min(K, N).
        method: a name or a configuration of ``svdkern.methods``.
        alpha: s = alpha / rank; None means s = 1.
        dropout_p: dropout on the adapter branch's input while training, in [0, 1].
        device, dtype: of residual and bias. adapter_dtype: of the factors.
    """

    dropout_p: float
    residual: nn.Parameter | None
    u: nn.Parameter
    sigma: nn.Parameter | None
    core: nn.Parameter | None
    v: nn.Parameter
    bias: nn.Parameter | None
    scale: Tensor
    u0: Tensor | None
    sigma0: Tensor | None
    v0: Tensor | None
    scale0: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        method: str | Method = "lora",
        alpha: float | None = None,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        config = method_named(method)
        scale = scale_of(alpha, rank, config)
        if rank != 0 or config.composes:  # a plain branch of rank 0 is the frozen layer
            check_linear(linear, rank, config, scale, dropout_p, adapter_dtype)
        self._fill(linear, config, initial_start(linear, rank, config, scale, adapter_dtype), scale, dropout_p)
        self.cut_out()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        method: str | Method = "pissa",
        *,
        alpha: float | None = None,
        dropout_p: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
        statistic: Tensor | None = None,
    ) -> SVDLinear:
        """An adapted layer that computes what ``linear`` computes, to the rounding of its weight's dtype (but for methods that
        mean to start elsewhere: docs/methods.md).

        ``linear`` is left as it is: its weight is never written to (other modules may share it). For "lora" the
        residual shares the weight's storage; methods that change the residual make a new tensor. The bias shares its
        storage.

        Args:
            linear: an ``nn.Linear`` with a float32, bfloat16, float16 or float64 weight.
            rank: r, 1 <= r <= min(in_features, out_features).
            method, alpha, dropout_p, adapter_dtype: as in ``SVDLinear``.
            statistic: of data, for methods that need one (``svdkern.calibration``); ``svdkern.adapt`` collects it.

        Raises:
            TypeError: not a plain ``nn.Linear``, or a weight that is not a plain floating-point tensor.
            ValueError: rank out of range, a weight with NaN or infinity, an unknown method, a bad alpha or dropout_p.
        """
        config = method_named(method)
        scale = scale_of(alpha, rank, config)
        check_linear(linear, rank, config, scale, dropout_p, adapter_dtype)
        start = initial_start(linear, rank, config, scale, adapter_dtype, statistic)
        layer = cls.before_cut(linear, config, start, scale, dropout_p)
        layer.cut_out()
        return layer

    @classmethod
    def before_cut(cls, linear: nn.Linear, config: Method, start: Start, scale: float, dropout_p: float) -> SVDLinear:
        """A layer with this start, unchecked, whose residual still is ``linear``'s weight itself: ``cut_out`` is to
        follow.

        It shares the storage of weight and bias, so it takes no memory but that of the start.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill(linear, config, start, scale, dropout_p)
        return layer

    def cut_out(self, dtype: torch.dtype | None = None, hashes: tuple[bytes, bytes] | None = None) -> None:
        """Put weight minus the cut in the residual's place, which until now is the weight.

        A new tensor: the weight is not written to, and stays the residual if anything fails, or if nothing is cut out.

        Args:
            dtype: what to cast the residual to (default: weight's dtype).
            hashes: SHA-256 of weight and residual, where they are known.
        """
        if self.fingerprint is None or self.residual is None or self.residual.is_meta:
            return
        weight = self.residual.detach()
        residual = residual_of(weight, self.config, self.initial).to(dtype or weight.dtype)
        hashes = hashes or (sha256(weight), sha256(residual))
        digests = (*hashes, sha256_together((self.u0, self.sigma0, self.v0)))
        self.fingerprint.copy_(torch.stack([digest_tensor(digest) for digest in digests]))
        self.residual = nn.Parameter(residual, requires_grad=False)

    def _fill(self, linear: nn.Linear, config: Method, start: Start, scale: float, dropout_p: float) -> None:
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.config, self.dropout_p, self.base_dtype = config, float(dropout_p), weight.dtype
        self.merged = False
        self.training = linear.training
        self.register_parameter("residual", nn.Parameter(weight, requires_grad=False) if config.has_residual else None)
        for name, tensor in start.factors.tensors().items():
            if name in config.state:
                self.register_buffer(name, tensor)
                continue
            self.register_parameter(
                name,
                tensor  # one that layers share stays shared
                if tensor is None or isinstance(tensor, nn.Parameter)
                else nn.Parameter(tensor, requires_grad=name in config.trains),
            )
        self.register_parameter(
            "bias", None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        )
        # never on meta: the scale is no state that a state_dict could bring back
        device = "cpu" if weight.is_meta else weight.device
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("kept", None, persistent=False)
        cut = start.cut
        self.register_buffer(
            "fingerprint", torch.zeros(3, 32, dtype=torch.uint8, device=weight.device) if cut else None
        )
        for name, value in zip(("u0", "sigma0", "v0"), cut[:3] if cut else (None,) * 3, strict=True):
            self.register_buffer(name, value)
        scale0 = torch.tensor(cut.scale, dtype=torch.float64, device=weight.device) if cut else None
        self.register_buffer("scale0", scale0)

    # ----------------------------------------------------------------------------------------------- computation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> y (..., N). While merged: the frozen linear of the merged weight, no gradient for factors."""
        if self.merged:
            return self._merged_forward(x)
        if self.config.composes:
            return self._composed_forward(x)
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        try:  # six attribute lookups through nn.Module.__getattr__ would cost 5 us
            residual, u, sigma, v = parameters["residual"], parameters["u"], parameters["sigma"], parameters["v"]
            bias, core, scale = parameters["bias"], parameters["core"], buffers["scale"]
        except KeyError:  # parametrized, a DataParallel replica, sharded: these keep a tensor as a plain attribute
            return self._composed_forward(x)
        dropout_p = self.dropout_p if self.training else 0.0
        return svd_linear(x, residual, u, sigma, v, bias, scale=scale, core=core, dropout_p=dropout_p)

    def _composed_forward(self, x: Tensor) -> Tensor:
        """The factors and the gate as the method makes them of its parameters, then the one call."""
        factors = self.config.call_factors(self, x)
        gate, group = self.config.gate(self, x)
        if self.training:
            self.config.observe(self, gate)
        y = svd_linear(
            x, self.residual, factors.u, factors.sigma, factors.v, self.bias,
            scale=self.scale, core=factors.core, gate=gate, group=group,
            dropout_p=self.dropout_p if self.training else 0.0,
        )  # fmt: skip
        return self.config.finish(self, x, y)

    def _merged_forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self._weight_or_residual()
        bias: Tensor | None = self.bias
        if x.dtype != weight.dtype and not autocast_is_on(x.device):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return linear(x, weight, bias)

    @property
    def weight(self) -> Tensor:
        """The effective weight (N, K) in residual's dtype, computed now; differentiable in the factors until merged.

        Every access computes it: code that reads ``layer.weight.dtype`` in its forward, as T5's feed-forward does with
        ``wo``, is slow with that layer adapted.

        Raises:
            RuntimeError: the method's branch depends on the input.
        """
        if self.merged:
            return self._weight_or_residual()
        u, sigma, core, v, _ = self._mergeable()
        return effective_weight(self.residual, u, sigma, v, self.scale, core, self.base_dtype)

    def _weight_or_residual(self) -> Tensor:
        assert self.residual is not None  # a merged layer has one
        return self.residual

    def _mergeable(self) -> Factors:
        if not self.config.merges:
            raise RuntimeError(f"{self.method}'s branch depends on the input: there is no one weight that equals it")
        with without_autocast(self.u.device):  # a weight's values do not depend on where it is asked for
            return self.config.product(self)

    @property
    def rank(self) -> int:
        """r, the width of the factors."""
        return self.config.rank_of(self)

    @property
    def method(self) -> str:
        """Name of the method; ``config`` is its configuration."""
        return self.config.name

    def adapter(self) -> dict[str, Tensor]:
        """The tensors of the method by name, trained and frozen: all of the layer but residual and bias."""
        shapes = self.config.shapes(self.in_features, self.out_features, self.rank)
        names = dict.fromkeys(("u", "sigma", "core", "v", *shapes))
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def initial(self) -> Cut | None:
        """The factors that were cut out of the original weight; None if the residual is that weight."""
        if self.u0 is None or self.v0 is None or self.scale0 is None:
            return None
        return Cut(self.u0, self.sigma0, self.v0, float(self.scale0))

    @property
    def unmerged_residual(self) -> Tensor | None:
        """The residual without the product, merged or not (RuntimeError after ``merge(keep=False)``)."""
        return self._kept_copy("that") if self.merged else self.residual

    # ------------------------------------------------------------------------------------------------- merging

    def merge(self, keep: bool = True) -> None:
        """Put the effective weight in residual's place; does nothing on a merged layer.

        The sum is made in float64 and rounded once; no dropout, no random numbers. With ``keep`` the unmerged residual
        stays in memory (as much again as the weight), so that ``unmerge`` restores its exact bits; without it,
        ``unmerge``, ``state_dict`` and saving raise. A tensor that another module shares is not written to. Changes of
        the factors or of the scale of a merged layer take effect when it is unmerged.

        Raises:
            RuntimeError: the method's branch depends on the input.
        """
        if self.merged:
            return
        u, sigma, core, v, _ = self._mergeable()
        residual = self.residual
        into = u.new_zeros(self.out_features, self.in_features, dtype=self.base_dtype) if residual is None else residual
        merged = merged_weight(into, u, sigma, v, self.scale, core)
        parameter = nn.Parameter(merged, requires_grad=into.requires_grad)
        # A new parameter, not new data in the old one: a graph that saved the old one must still see the old values.
        self._buffers["kept"] = residual if keep else None
        self.residual = parameter
        self.merged = True

    def unmerge(self) -> None:
        """Restore the residual's exact bits; does nothing on a layer that is not merged.

        Raises:
            RuntimeError: the layer was merged with ``keep=False``.
        """
        if not self.merged:
            return
        kept = self._kept_copy("unmerge")
        if kept is not None and not isinstance(kept, nn.Parameter):  # a cast or a move has made a plain tensor of it
            kept = nn.Parameter(kept, requires_grad=self._weight_or_residual().requires_grad)
        self.merged = False
        self.residual = kept
        self._buffers["kept"] = None

    def _kept_copy(self, what: str) -> Tensor | None:
        if self.kept is None and self.config.has_residual:
            raise RuntimeError(_NO_COPY.format(what=what))
        return self.kept

    # --------------------------------------------------------------------------------------------- appearance

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(_READ_ONLY)
        if name == "scale" and not isinstance(value, Tensor) and "scale" in self.__dict__.get("_buffers", ()):
            with torch.no_grad():
                self.scale.fill_(float(value))
            return
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, method={self.method!r}, scale={float(self.scale):g}, "
            f"dropout_p={self.dropout_p:g}" + (", merged=True" if self.merged else "")
        )
