"""What a training step is: with labels, and by distillation from a teacher."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from ..conversion import Report
from ..conversion.sensitivity import Returned
from ..cost.preserving import copied
from ..outputs import Outputs
from .checking import IGNORED, check_labels
from .loading import STEP, seed_of
from .matching import Matching
from .optimizing import optimizer_of, schedule_of, sizes_of, without_decay
from .recipe import Distillation, Recipe

LOG_EVERY = 50
"""optimiser steps"""


def inputs_of(batch: Any) -> Tensor:
    """The inputs of a batch: itself, or what it begins with."""
    inputs = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"`data` yields a {type(batch).__name__}; batches must be tensors or pairs that begin "
            "with one"
        )
    return inputs


def labels_of(batch: Any, logits: Tensor) -> Tensor:
    """The labels of a batch `(inputs, labels)`, as cross-entropy takes them.

    Args:
        batch: its labels are classes `[N, *spatial]`, or probabilities `[N, classes, *spatial]`.
        logits: `[N, classes, *spatial]`.

    Raises:
        TypeError: there are no labels, or they are of another kind.
        ValueError: a label is no class of the network, or the network returns no logits.
    """
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise TypeError("`data` yields no labels; training with labels needs (inputs, labels)")
    if logits.ndim < 2:
        raise ValueError(
            f"`model` returns {list(logits.shape)}; training with labels needs logits [N, classes]"
        )
    return check_labels(batch[1], logits.shape)


class Learning(LightningModule):
    """A network in training: optimiser, schedule, metrics and seeds.

    Args:
        network: is trained in place.
        recipe: how.
    """

    monitor: tuple[str, str]
    """the metric that says which weights are best, and whether "min" or "max" is best"""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.recipe = network, recipe
        self.plain = without_decay(network)
        self.sizes = sizes_of(network) if recipe.is_relative else {}

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule."""
        # a sharding strategy adds prefixes of its own
        named = (
            (name.replace("_fsdp_wrapped_module.", "").removeprefix("network."), parameter)
            for name, parameter in self.named_parameters()
        )
        # Lightning's own estimate would set the loader up before a checkpoint's state is there
        feeding: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = len(feeding.train_dataloader())
        steps = math.ceil(batches / self.recipe.accumulate)
        # or a short epoch would end unlogged
        self.trainer.log_every_n_steps = min(LOG_EVERY, steps)  # type: ignore[attr-defined]
        optimizer = optimizer_of(named, self.plain, self.recipe, self.sizes)
        scheduler = schedule_of(optimizer, self.recipe.epochs * steps, self.recipe)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Limit the norm of the gradients, over all parts of them where they are sharded."""
        sharded = self.trainer.strategy.model
        if gradient_clip_val and isinstance(sharded, FullyShardedDataParallel):
            sharded.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make what the network draws, as for dropout, a function of the seed and the batch."""
        place = (self.trainer.current_epoch, batch_idx, self.trainer.global_rank)
        torch.manual_seed(seed_of(self.recipe.seed, STEP, *place))

    def record(self, name: str, metric: Metric) -> None:
        """Log a metric over the whole validation part."""
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=True)

    def record_loss(self, loss: Tensor) -> None:
        """Log a training step's loss.

        Raises:
            ValueError: it is no number any more.
        """
        # on a GPU, looking means waiting for it
        looks = loss.device.type == "cpu" or self.global_step % LOG_EVERY == 0
        if looks and not loss.isfinite():
            raise ValueError(
                f"the loss is {loss.item()} in step {self.global_step}: the training diverged; "
                f"lower `lr` (={self.recipe.peak_lr:g}), or look for NaN in `data`"
            )
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)

    def check_finite(self, weights: Mapping[str, Any], first: Mapping[str, Any]) -> None:
        """Refuse what a training ended with if its last step has spoilt it.

        Args:
            weights: with statistics.
            first: those it began with; infinities of theirs, as in a mask, are no harm.

        Raises:
            ValueError: a weight is no number any more.
        """
        for name, weight in weights.items():
            if _is_spoilt(weight, first.get(name)):
                raise ValueError(
                    f"the weight {name!r} is no number after {self.global_step} steps: the "
                    f"training diverged; lower `lr` (={self.recipe.peak_lr:g})"
                )


def _is_spoilt(weight: Any, first: Any) -> bool:
    # the smallest floats can't be asked
    if not (isinstance(weight, Tensor) and isinstance(first, Tensor)) or weight.itemsize == 1:
        return False
    return bool((first.isfinite().to(weight.device) & ~weight.isfinite()).any())


class Supervised(Learning):
    """Learning from labels: cross-entropy, smoothed."""

    monitor = ("val_accuracy", "max")

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__(network, recipe)
        self.loss, self.accuracy = MeanMetric(), MulticlassAccuracy(average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch `(inputs, labels)`."""
        logits = self.network(inputs_of(batch)).float()
        labels = labels_of(batch, logits)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.record_loss(loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the validation's loss and accuracy."""
        logits = self.network(inputs_of(batch)).float()
        labels = labels_of(batch, logits)
        losses = F.cross_entropy(logits, labels, reduction="none")
        classes = labels.argmax(1) if labels.is_floating_point() else labels
        counted = classes != IGNORED
        if counted.any():
            self.loss.update(losses[counted])
            self.accuracy.update(logits.argmax(1)[counted], classes[counted])
        self.record("val_loss", self.loss)
        self.record("val_accuracy", self.accuracy)


class Distilling(Learning):
    """A student learns its teacher's outputs (Hinton et al. 2015, arXiv:1503.02531).

    Labels are looked at only where the recipe asks for them.

    Args:
        network: the student.
        teacher: is left as it is, and not saved.
        recipe: how.
    """

    monitor = ("val_loss", "min")

    def __init__(self, network: nn.Module, teacher: nn.Module, recipe: Distillation) -> None:
        super().__init__(network, recipe)
        self.distillation = recipe
        report = getattr(network, "report", None)
        self.kind = recipe.outputs
        if recipe.outputs == "auto" and isinstance(report, Report):
            self.kind = report.outputs
        # no submodule: neither averaged nor saved
        self.held = _Held(teacher)
        self.matching = (
            Matching(network, teacher, recipe.blocks)
            if recipe.features
            else contextlib.nullcontext()
        )
        self.loss, self.agreement = MeanMetric(), MeanMetric()

    def on_fit_start(self) -> None:
        """Put the teacher where the student is, in its arithmetic."""
        self.held.teacher.to(self.device, self.recipe.dtype)

    def on_train_start(self) -> None:
        """Keep the statistics of batch norm in an epoch that is resumed, too."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Keep the statistics of batch norm where the recipe says so."""
        if self.distillation.batch_norm == "frozen":
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of inputs, or `(inputs, labels)`."""
        recipe, inputs = self.distillation, inputs_of(batch)
        with self.matching as features:
            with torch.no_grad():
                goal = self.held.teacher(inputs)
            outputs = self.network(inputs)
        loss = divergence(outputs.float(), goal.float(), recipe.temperature, self.kind).mean()
        if recipe.labels:
            labels = labels_of(batch, outputs)
            hard = F.cross_entropy(outputs.float(), labels, label_smoothing=recipe.label_smoothing)
            loss = (loss + hard) / 2
        if features is not None:
            loss = loss + recipe.features * features.loss()
        self.record_loss(loss)
        return loss

    @torch.no_grad()
    def check_blocks(self, inputs: Tensor) -> None:
        """Try on which modules' outputs student and teacher can be matched.

        Raises:
            ValueError: a module is not called, or the shapes differ.
            TypeError: a module returns no tensor.
        """
        if not isinstance(self.matching, Matching):
            return
        pair = copied(self.network).eval(), self.held.teacher
        with Matching(*pair, self.distillation.blocks) as features:
            for network in pair:
                network(inputs.to(next(network.parameters()).device))
        features.loss()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the divergence from the teacher, and to how often both agree."""
        inputs = inputs_of(batch)
        goal, outputs = self.held.teacher(inputs).float(), self.network(inputs).float()
        self.loss.update(divergence(outputs, goal, 1.0, self.kind))
        self.record("val_loss", self.loss)
        if Returned.of(goal).compared_as(self.kind, "teacher") == "logits":
            self.agreement.update((outputs.argmax(1) == goal.argmax(1)).float())
            self.record("val_agreement", self.agreement)


class _Held:
    """A teacher that a copy of its student shares."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def __deepcopy__(self, _: Any) -> _Held:
        return self


def divergence(outputs: Tensor, goal: Tensor, temperature: float, kind: Outputs = "auto") -> Tensor:
    """How far a student's outputs are from its teacher's, for each input.

    Logits `[N, classes]`: T² KL(softmax(goal / T) ‖ softmax(outputs / T)), whose gradient does
    not fade as T grows. Other outputs: the squared error over that of the batch's mean.

    Args:
        outputs: `[N, ...]`, the student's.
        goal: the same shape.
        temperature: T.
        kind: what they are.

    Returns:
        `[N]`.

    Raises:
        ValueError: they are no logits, though `kind` says so.
    """
    if Returned.of(goal).compared_as(kind, "teacher") == "logits":
        of_student = F.log_softmax(outputs / temperature, 1)
        of_teacher = F.log_softmax(goal / temperature, 1)
        terms = F.kl_div(of_student, of_teacher, reduction="none", log_target=True)
        return temperature**2 * terms.sum(1)
    return relative_error(outputs, goal)


def relative_error(outputs: Tensor, goal: Tensor) -> Tensor:
    """Squared error of each input over the mean squared distance of the goals from their mean.

    The mean is that of each value over the inputs, or of a single input over its values.
    """
    centre = goal.mean(0) if len(goal) > 1 else goal.mean()
    spread = (goal - centre).square().flatten(1).sum(1).mean()
    limits = torch.finfo(goal.dtype)
    floor = limits.eps * goal.square().flatten(1).sum(1).mean() + limits.tiny  # goals all alike
    return (outputs - goal).square().flatten(1).sum(1) / spread.clamp(min=floor)
