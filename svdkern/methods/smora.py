"""SMoRA: every rank of a LoRA is an expert, and a router chooses k of them for each token.

    l = sigmoid(x W_router)          T = the k ranks with the largest l + b          g_T = k l_T / sum_T l, 0 elsewhere
    y = x W + (alpha / k) ((x U) * g) V^T
    U ~ kaiming_uniform(a = sqrt 5), V = 0, W_router ~ kaiming_uniform(a = sqrt 5), b = 0
    trains U, V, W_router (K, r / p): the p ranks of a partition share a logit

After every step the load is balanced: ``b += rate sign(mean count - count)`` over the tokens that chose a partition in its
forwards, in all processes of ``torch.distributed``'s default group (each has to make the call). A forward never moves b, so that
one that is computed again chooses again what it chose.
``compat="official"`` also adds b to the value of the gate, not only to what is compared, as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from svdkern.methods.lora import kaiming
from svdkern.methods.method import Card, Compat, Factors, Layer, Method


@dataclass(frozen=True)
class SMoRA(Method):
    """SMoRA (Zhao et al., 2025). In the code: 8 active ranks, partitions of one rank.

    Args:
        active: k, ranks that work for a token.
        partition: p, ranks that share a logit; rank and ``active`` are multiples of it.
        balance_rate: step of the load balancing; 0 switches it off.
        compat: "paper", or "official" for b in the gate's value.
    """

    active: int = 8
    partition: int = 1
    balance_rate: float = 1e-5
    compat: Compat = "paper"

    name: ClassVar[str] = "smora"
    citation: ClassVar[str] = (
        "Z. Zhao, Y. Zhou, Z. Zhang, D. Zhu, T. Shen, Z. Li, J. Yang, X. Wang, J. Su, K. Kuang, Z. Wei, F. Wu, Y. Cheng: "
        "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning. arXiv 2501.15103, 2025"
    )
    card: ClassVar[Card] = Card(
        "x W + (alpha / k) ((x U) * g(x)) V^T",
        "U and router random (kaiming), V = 0; the weight's output",
        "r*(K + N) + K*r",
        hooks="after a step: the balancing bias b moves, by the tokens of all forwards of the step and of all processes",
        differs='The code adds b to the gate\'s value, too: `compat="official"`. It moves b at every forward, not at every step. '
        "No merging: the branch depends on the input.",
    )
    published_rank: ClassVar[int] = 64
    trains: ClassVar[tuple[str, ...]] = ("u", "v", "router")
    state: ClassVar[Mapping[str, torch.dtype]] = {"balance": torch.float32}
    draws: ClassVar[bool] = True
    composes: ClassVar[bool] = True
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition < 1 or self.active < 1 or self.active % self.partition:
            raise ValueError(
                f"active is {self.active}, partition is {self.partition}, expected a multiple of partition >= 1"
            )

    def divisor(self, rank: int) -> int:
        return self.active

    def check_rank(self, in_features: int, out_features: int, rank: int) -> None:
        super().check_rank(in_features, out_features, rank)
        if rank < self.active or rank % self.partition:
            raise ValueError(
                f"rank is {rank}, expected a multiple of partition={self.partition} that is >= active={self.active}"
            )

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        parts = rank // self.partition
        return {**super().shapes(in_features, out_features, rank), "router": (in_features, parts), "balance": (parts,)}

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        parts = rank // self.partition
        extra = {"router": kaiming(weight, parts, dtype), "balance": weight.new_zeros(parts, dtype=torch.float32)}
        v = weight.new_zeros(weight.shape[0], rank, dtype=dtype)
        return Factors(kaiming(weight, rank, dtype), None, None, v, extra)

    def gate(self, layer: Layer, x: Tensor) -> tuple[Any, Tensor | None]:
        logits = (x @ layer.router.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
        value = logits.sigmoid()
        balanced = value + layer.balance
        chosen = balanced.detach().topk(self.active // self.partition, dim=-1).indices
        value = (balanced if self.compat == "official" else value).gather(-1, chosen)
        total = value.sum(-1, keepdim=True) * self.partition
        # b may have made the official one negative; the other is 0 where all sigmoids underflow
        total = total.clamp_min(1e-6 if self.compat == "official" else torch.finfo(total.dtype).tiny)
        value = self.active * value / total
        if self.partition == 1:
            return (chosen, value), None
        ranks = chosen.unsqueeze(-1) * self.partition + torch.arange(self.partition, device=x.device)
        return (ranks.flatten(-2), value.repeat_interleave(self.partition, dim=-1)), None

    def observe(self, layer: Layer, gate: Any) -> None:
        if not (self.balance_rate and torch.is_grad_enabled() and layer.router.requires_grad):
            return
        chosen, before = gate[0].flatten() // self.partition, layer.__dict__.get("counts")
        counts = torch.bincount(chosen, minlength=layer.balance.numel())
        layer.__dict__["counts"] = counts if before is None or before.device != counts.device else before + counts

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if not self.balance_rate:
            return
        device = layers[0].balance.device
        held = [layer.__dict__.pop("counts", None) for layer in layers]
        counts = torch.cat([
            torch.zeros_like(layer.balance, dtype=torch.int64, device=device) if count is None else count.to(device)
            for layer, count in zip(layers, held, strict=True)
        ])  # fmt: skip
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        for layer, count in zip(layers, counts.split([layer.balance.numel() for layer in layers]), strict=True):
            move = (count.double().mean() - count).sign().to(layer.balance)
            layer.balance.add_(move, alpha=self.balance_rate)
