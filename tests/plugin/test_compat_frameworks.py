"""Accelerate, transformers' Trainer and Lightning, each on a toy model.

Their imports are slow, so they are made in the tests.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compat import Cell, Model, gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phantomgrad import AttachError, FixedPointIteration, NeumannPhantom, attach, attachments, is_attached

REASON = "a toy model is trained with it where it is installed"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no trackers."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WANDB_DISABLED", "true")


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate", reason=REASON)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


def _data() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(8))
    return x, (x.sum(dim=1) > 0).long()


def _model() -> Model:
    torch.manual_seed(7)
    model = Model()
    attach(model.cell, NeumannPhantom(), solver=FixedPointIteration(max_steps=100))
    return model


def _loader(size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*_data()), batch_size=size)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_a_model_with_an_attached_cell(accelerate: Any, precision: str) -> None:
    model = _model()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), _loader(16))
    before = model.cell.recurrent.weight.detach().clone()
    losses: list[float] = []
    for _ in range(6):
        for x, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(prepared(x), labels)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert not torch.equal(model.cell.recurrent.weight, before)
    [attachment] = attachments(accelerator.unwrap_model(prepared))
    assert attachment.solution is not None
    # The start is made like the encoder's output, and a state's dtype never changes.
    assert attachment.solution.value.dtype is (torch.float32 if precision == "no" else torch.bfloat16)


def test_accelerate_accumulates_to_the_gradient_of_the_whole_batch(accelerate: Any) -> None:
    whole, model = _model(), _model()
    x, labels = _data()
    nn.functional.cross_entropy(whole(x), labels).backward()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), _loader(16))
    steps = 0
    for x, labels in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(x), labels))
            if accelerator.sync_gradients:
                steps += 1
                for name, expected in gradients(whole).items():
                    torch.testing.assert_close(gradients(model)[name], expected, rtol=2e-3, atol=1e-5)
            optimizer.step()
            optimizer.zero_grad()
    assert steps == 1


def test_accelerate_may_wrap_the_attached_module_itself(accelerate: Any) -> None:
    cell, x = Cell(), torch.randn(3, 4)
    attachment = attach(cell, solver=FixedPointIteration(max_steps=100))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(cell)
    assert is_attached(prepared)
    assert list(attachments(prepared)) == [attachment]
    with pytest.raises(AttachError, match=r"^Cell is attached already\."):
        attach(prepared)
    text = r"^The forward of Cell was wrapped after attaching, so it cannot be given back\. Unwrap it first"
    with pytest.raises(AttachError, match=text):
        attachment.remove()
    other = copy.deepcopy(prepared)  # follows the copy although its forward is wrapped
    with torch.no_grad():
        other.recurrent.weight.zero_()
        expected = torch.tanh(0.4 * other.recurrent.bias + x)
        torch.testing.assert_close(other(torch.zeros(3, 4), x), expected, rtol=1e-2, atol=1e-2)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is cell
    with torch.no_grad():
        z = unwrapped(torch.zeros(3, 4), x)
        assert attachment.solution is not None
        assert attachment.solution.converged.all()
        torch.testing.assert_close(z, attachment.step(z, x), rtol=1e-3, atol=1e-3)
        attachment.remove()
        torch.testing.assert_close(unwrapped(torch.zeros(3, 4), x), torch.tanh(0.4 * cell.recurrent.bias + x))


def test_the_trainer_of_transformers_trains_evaluates_and_stores(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=REASON)

    class Config(transformers.PreTrainedConfig):
        model_type = "toy"

    class Toy(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.body = _model()
            self.post_init()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}  # type: ignore[arg-type]

    model = Toy(Config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"x": x, "labels": label, "unknown": 0} for x, label in zip(*_data(), strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * first
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    trainer.save_model(str(tmp_path / "stored"))
    loaded = Toy.from_pretrained(tmp_path / "stored")
    x = _data()[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded.body(x), model.body(x))
    assert len(list(attachments(loaded))) == 1


# Lightning flattens its loaders with a name that torch has deprecated, and would like more workers than a toy needs.
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
def test_the_trainer_of_lightning_trains_and_restores(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason=REASON)

    class Toy(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = _model()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    model = Toy()
    x, labels = _data()
    before = model.body.cell.recurrent.weight.detach().clone()
    with torch.no_grad():
        first = nn.functional.cross_entropy(model.body(x), labels)
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=2,
        gradient_clip_val=10.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, _loader(8))
    with torch.no_grad():
        assert nn.functional.cross_entropy(model.body(x), labels) < 0.6 * first
    assert not torch.equal(model.body.cell.recurrent.weight, before)
    trainer.save_checkpoint(tmp_path / "toy.ckpt")
    loaded = Toy.load_from_checkpoint(tmp_path / "toy.ckpt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded.body(x), model.body(x))
    assert len(list(attachments(loaded))) == 1
