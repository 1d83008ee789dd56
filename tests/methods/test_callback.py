"""``MethodCallback`` in a real Trainer against the loop written by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes import batch, configured, data_for, net
from torch import Tensor, nn

import svdkern
from svdkern.methods import OSF, SST, CoDyRA, KaSA, Method, SoMA

pytestmark = pytest.mark.peer
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate, as transformers.Trainer does")

METHODS = [
    KaSA(beta=0.1, gamma=0.1),
    OSF(),
    CoDyRA(kappa=5.0, total_steps=4, dense_share=0.0),
    pytest.param(SST(interval=2), marks=pytest.mark.slow),
    pytest.param(SoMA(total_steps=4), marks=pytest.mark.slow),
]


class Model(nn.Module):
    """The test net with the output that a Trainer expects."""

    def __init__(self, config: Method, n: int = 9) -> None:
        super().__init__()
        self.net = net(n=n)
        torch.manual_seed(0)
        svdkern.adapt(self.net, config, rank=3, data=data_for(config))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


@pytest.mark.parametrize("config", METHODS, ids=lambda config: getattr(config, "name", None))
def test_a_trainer_with_the_callback_is_the_hand_written_loop(config: Method, tmp_path: Path) -> None:
    from svdkern.integrations.transformers import MethodCallback

    data = batch()
    samples = [{"x": x, "labels": y} for x, y in zip(data["x"], data["target"], strict=True)]
    mine, theirs = Model(config), Model(config)
    torch.manual_seed(3)  # for what hooks draw
    optimizer = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=0.01, weight_decay=0.05)
    hooks = svdkern.Hooks(mine, optimizer)
    for _ in range(4):
        for sample in samples:  # gradient accumulation over two batches of one sample
            (mine(sample["x"][None], sample["labels"][None])["loss"] / 2).backward()
        nn.utils.clip_grad_norm_([p for p in mine.parameters() if p.requires_grad], 0.05)
        penalty = svdkern.regularization(mine)
        if penalty.requires_grad:
            penalty.backward()
        hooks.on_backward_end()
        optimizer.step()
        hooks.on_step_end()
        optimizer.zero_grad()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4,
        max_grad_norm=0.05, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3,
        remove_unused_columns=False,
    )  # fmt: skip
    callback = MethodCallback(theirs)
    given = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01, weight_decay=0.05)
    constant = torch.optim.lr_scheduler.LambdaLR(given, lambda step: 1.0)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):  # type: ignore[no-untyped-def]
            return torch.utils.data.SequentialSampler(samples)

        def train(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            torch.manual_seed(3)
            return super().train(*args, **kwargs)

    InOrder(theirs, arguments, train_dataset=samples, callbacks=[callback], optimizers=(given, constant)).train()
    assert callback.hooks.step == 4 == hooks.step
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    assert given.param_groups[0]["weight_decay"] == pytest.approx(optimizer.param_groups[0]["weight_decay"])


def test_a_step_that_accelerate_skipped_is_not_counted() -> None:
    from svdkern.integrations.transformers import MethodCallback

    callback = MethodCallback(Model(KaSA()))
    for skipped in (False, True):
        callback.on_optimizer_step(None, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
    assert callback.hooks.step == 1


def test_a_penalty_in_the_loss_is_not_added_twice() -> None:
    from svdkern.integrations.transformers import MethodCallback

    model = Model(KaSA(beta=1.0))
    callback = MethodCallback(model, penalty=False)
    callback.on_pre_optimizer_step(None, None, None)
    assert all(p.grad is None for p in model.parameters())
    MethodCallback(model).on_pre_optimizer_step(None, None, None)
    assert torch.allclose(model.net.up.sigma.grad, 2 * model.net.up.sigma)


def test_scaled_gradients_that_are_never_unscaled_are_refused(tmp_path: Path) -> None:
    from svdkern.integrations.transformers import MethodCallback

    callback = MethodCallback(Model(KaSA()))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_grad_norm=0.0)
    arguments.fp16 = True  # as on a GPU
    with pytest.raises(ValueError, match="fp16 is on and max_grad_norm is 0"):
        callback.on_train_begin(arguments, transformers.TrainerState(), transformers.TrainerControl())


@pytest.mark.parametrize("method", ["svfit", "randlora"])
def test_a_trainer_saves_checkpoints_and_resumes_from_one(method: str, tmp_path: Path) -> None:
    """Methods whose layers hold one tensor twice, or share one: safetensors takes neither."""
    from svdkern.integrations.transformers import MethodCallback

    samples = [{"x": x, "labels": y} for x, y in zip(*(batch(n=12)[name] for name in ("x", "target")), strict=True)]

    def trained(steps: int, resume: bool) -> Model:
        model = Model(configured(method), n=12)  # both layers have the shape that RandLoRA's share bases by
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, report_to=[], save_steps=2, use_cpu=True, disable_tqdm=True, seed=3,
            remove_unused_columns=False, lr_scheduler_type="constant", learning_rate=0.01,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=samples, callbacks=[MethodCallback(model)])
        trainer.train(resume_from_checkpoint=resume or None)
        return model

    whole = trained(4, False)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = trained(4, True)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(whole.net.up.sigma, Model(configured(method), n=12).net.up.sigma)
