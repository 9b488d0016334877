"""The training loop: step, validate, checkpoint, log."""

import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm3.common.device import memory_advice
from cm3.common.distributed import ProcessShard
from cm3.common.errors import UserError
from cm3.config import Training
from cm3.evaluation.ranking import Validation
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch, Sampler, derived_seed
from cm3.training.adam import Adam
from cm3.training.checkpoint import Checkpoint
from cm3.training.cuda_graph import StaticStep, are_full, graphed_step
from cm3.training.curves import Curves
from cm3.training.memory import memory_hint, release_gradients
from cm3.training.pruning import Trial, scores_of
from cm3.training.schedule import GracefulStop, batches_per_step, grouped, lr_factor
from cm3.training.state import Best, State
from cm3.training.trackers import Trackers

log = logging.getLogger(__name__)

_REST = 9  # pause between checkpoints, in multiples of the time that writing one takes
_LOG_SECONDS = 20.0


class DivergedError(UserError):
    """The loss is not finite."""


@dataclass
class Fitted:
    """A finished run: the best epoch's parameters and embeddings (of several processes the first one has them), and the history."""

    parameters: dict[str, Tensor]
    users: Tensor
    items: Tensor
    best: Best
    history: list[dict[str, Any]]
    stopped: str
    seconds_per_epoch: float
    batches_per_step: int = 1
    cuda_graph: bool = False


def fit(
    model: Network,
    sampler: Sampler,
    validation: Validation,
    settings: Training,
    checkpoint: Checkpoint,
    test: Validation | None = None,
    curves: Path | None = None,
    shard: ProcessShard | None = None,
    trial: Trial | None = None,
    trackers: Trackers | None = None,
) -> Fitted:
    """Train until validation has not improved for `settings.patience` validations in a row, or epochs run out.

    Resumes from the checkpoint if there is one; on the CPU the result is then bit-identical to an uninterrupted run.

    Args:
        model: initialised, on the device to train on.
        sampler: of the training pairs, on the same device.
        validation: computes the monitored metric on the validation split.
        settings: how to train.
        checkpoint: stores the state between batches.
        test: computes the same metric on the test split; only for `select_on: test`.
        curves: folder for TensorBoard's event files; None writes none.
        shard: this process's part, of several processes that train one model; the first one writes.
        trial: the trial of a search that this run is; its pruner may end it.
        trackers: get each epoch's numbers, too.

    Raises:
        PrunedError: the pruner of `trial` ended the run; the checkpoint is written.
        UserError: the loss is not finite; the message names the epoch, the batch, the component or parameter, and the
            checkpoint. Or memory ran out, several processes train a model that supports one process only, or they
            drew different batches.
        SystemExit: SIGTERM requested a stop; the checkpoint is written.
        KeyboardInterrupt: Ctrl-C did.
    """
    if shard and not model.supports_ddp:
        raise UserError("training.processes: this model supports one process only; set it to 1")
    if shard:
        model.split(shard)
    with memory_advice(f"training on {sampler.users.device.type}", memory_hint(settings)):
        return _fit(model, sampler, validation, settings, checkpoint, test, curves, shard, trial, trackers)


def _fit(
    model: Network,
    sampler: Sampler,
    validation: Validation,
    settings: Training,
    checkpoint: Checkpoint,
    test: Validation | None,
    curves: Path | None,
    shard: ProcessShard | None,
    trial: Trial | None,
    trackers: Trackers | None,
) -> Fitted:
    first = shard is None or shard.rank == 0
    run = TrainingRun(model, sampler, validation, settings, checkpoint, test)
    plotted = Curves(curves if settings.tensorboard and first else None, run.state.epoch)
    state, seconds, epochs_here = run.state, 0.0, 0
    stopped = run.finished()
    with GracefulStop(enabled=first) as stop:
        while not stopped:
            started = time.monotonic()
            run.check_pruned(trial)
            try:
                last = run.epoch(stop)
            except DivergedError as error:
                if trial and first:
                    trial.report_failure(str(error), scores_of(state.history, settings.monitor))
                raise
            run.validate(last)
            seconds, epochs_here = seconds + time.monotonic() - started, epochs_here + 1
            run.log_epoch(time.monotonic() - started)
            plotted.add(state.history[-1])
            if trackers and first:
                trackers.add(state.history[-1])
            stopped = run.finished()
            state.epoch, state.step = state.epoch + 1, 0
            run.save_if_due(stop, bool(stopped))
    plotted.close()
    per_step, cuda_graph = run.per_step, run.static_step is not None
    del run  # the moments, before the best epoch is read
    best = checkpoint.load_best(state.best.epoch) if first else {}
    return Fitted(
        {name: best[f"best.{name}"] for name, _ in model.named_parameters()} if first else {},
        best.get("best_users", torch.empty(0)),
        best.get("best_items", torch.empty(0)),
        state.best,
        state.history,
        stopped,
        seconds / max(epochs_here, 1),
        per_step,
        cuda_graph,
    )


class TrainingRun:
    """The model with its optimiser, data and state, during one call of `fit`."""

    def __init__(
        self,
        model: Network,
        sampler: Sampler,
        validation: Validation,
        settings: Training,
        checkpoint: Checkpoint,
        test: Validation | None,
    ) -> None:
        self.model, self.sampler, self.settings, self.checkpoint = model, sampler, settings, checkpoint
        self.validation, self.test = validation, test
        self.device = sampler.users.device
        self.optimiser = Adam(model.parameters(), settings.lr, settings.weight_decay, settings.optimizer_state)
        self.per_step = batches_per_step(settings, len(sampler.users))
        self.steps = -(-sampler.n_batches // self.per_step)
        if settings.batches_per_step == "auto":
            log.info("batches_per_step: %d, for %d training interactions", self.per_step, len(sampler.users))
        losses = torch.zeros(self.steps, 2 + len(model.components), device=self.device)
        stored = State.load(checkpoint, model, self.optimiser, losses)
        self.state = stored or State(losses)
        if stored:
            log.info(
                "resuming from the checkpoint: epoch %d, after step %d of %d", stored.epoch, stored.step, self.steps
            )
        self.saved, self.writing = time.monotonic(), 0.0
        self.draws_checked = False
        self.static_step: StaticStep | None = None
        single = model.supports_cuda_graph and model.shard is None and self.device.type == "cuda"
        self.capture_due = single and settings.cuda_graph is not False

    def epoch(self, stop: GracefulStop) -> Embeddings | None:
        """Take the remaining steps of the epoch; return the last step's embeddings where `eval_embeddings` wants them."""
        state, last = self.state, None
        first, started = state.step, time.monotonic()
        logged = started
        self.model.begin_epoch(derived_seed(self.settings.seed, state.epoch))
        for batches in grouped(self.sampler.epoch(state.epoch, first * self.per_step), self.per_step):
            if self.settings.eval_embeddings == "last_batch" and state.step == self.steps - 1:
                with torch.no_grad():
                    last = self.model.training_embeddings(self._seed())
            self.check_shared_draws(batches)
            self.step(batches)
            state.step += 1
            now = time.monotonic()
            if now - logged >= _LOG_SECONDS:
                logged = now
                left = (now - started) / (state.step - first) * (self.steps - state.step)
                log.info("epoch %d: step %d of %d, %.0f s left in it", state.epoch, state.step, self.steps, left)
            if state.step < self.steps:
                self.save_if_due(stop)
        release_gradients(self.model, self.optimiser)  # a validation needs the memory
        self.check_finite_losses()
        return last

    def check_shared_draws(self, batches: Sequence[Batch]) -> None:
        """Check before the first step that all processes have the same batches and random numbers.

        Raises:
            UserError: they differ.
        """
        if self.model.shard is None or self.draws_checked:
            return
        self.draws_checked = True
        drawn = [ids for batch in batches for ids in (batch.users, batch.items, batch.negatives)]
        self.model.shard.check_equal([*drawn, *self.model.random_draws(self._seed())], "batches")

    def _seed(self) -> int:
        return derived_seed(self.settings.seed, self.state.epoch, self.state.step)

    def step(self, batches: Sequence[Batch]) -> None:
        """Take one step of Adam on the mean loss of some batches."""
        settings, state = self.settings, self.state
        self.optimiser.lr = settings.lr * lr_factor(settings, state.epoch, state.step, self.steps)
        state.losses[state.step] = self.gradients(batches)
        self.optimiser.step()

    def gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Set the gradients of the mean loss of some batches; return the loss, its components and the norm, (2 + C,)."""
        if self.capture_due and are_full(batches, self.per_step, self.sampler.batch_size):
            self.capture_due = False
            draws = self.model.random_draws(self._seed())
            self.static_step = graphed_step(
                self.static_gradients,
                self.model.parameters(),
                batches,
                draws,
                required=self.settings.cuda_graph is True,
            )
        if self.static_step is not None and self.static_step.fits(batches):
            return self.static_step.run(batches, self.model.random_draws(self._seed()))
        release_gradients(self.model, self.optimiser)
        loss = self.model.backward(batches, self._seed())
        if self.device.type == "cpu":
            self.check_finite(loss)
        if self.model.shard:
            shared = (p for name, p in self.model.named_parameters() if not self.model.is_split(name))
            self.model.shard.sum_gradients(shared)
        return self._recorded(loss)

    def static_gradients(self, batches: Sequence[Batch], draws: Sequence[Tensor]) -> Tensor:
        """Do what `gradients` does, given the random draws, by operations that a CUDA graph can hold."""
        self.optimiser.zero_grad()
        return self._recorded(self.model.backward_drawn(batches, draws))

    def _recorded(self, loss: Loss) -> Tensor:
        values = [loss.total, *(loss.components[name] for name in self.model.components)]
        return torch.stack([*values, self._clipped_norm()])

    def validate(self, last: Embeddings | None) -> None:
        """Add the epoch to the history, with scores where a validation is due: of `last`, or else of a new forward pass."""
        state, settings, name = self.state, self.settings, self.settings.monitor
        names = ("loss", *self.model.components, "grad_norm")
        means = dict(zip(names, state.losses.cpu().double().mean(0).tolist(), strict=True))
        due = not state.epoch % settings.validate_every or state.epoch == settings.epochs
        fresh = self.model.embed() if due and last is None else None
        row: dict[str, Any] = {"epoch": state.epoch, **means, **self.model.curves(fresh)}
        row |= {f"valid_{name}": None} | ({f"test_{name}": None} if self.test is not None else {})
        state.history.append(row)
        embeddings = fresh or last
        if not due or embeddings is None:
            return
        users, items = embeddings.users.detach(), embeddings.items.detach()
        value, tested = self.validation.score(users, items), None
        if settings.round_valid is not None:
            value = round(value, settings.round_valid)
        row[f"valid_{name}"] = value
        if self.test is not None:
            row[f"test_{name}"] = tested = self.test.score(users, items)
        state.stale += 1
        if state.best.valid is None or value > state.best.valid:
            state.best, state.stale = Best(state.epoch, value, tested), 0
            parameters = {f"best.{name}": self.model.gathered(name, p) for name, p in self.model.named_parameters()}
            if not (self.model.shard and self.model.shard.rank):
                self.checkpoint.save_best(state.epoch, {**parameters, "best_users": users, "best_items": items})

    def _clipped_norm(self) -> Tensor:
        """Return the norm of the gradient, then clip it where that is set."""
        held = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        norm = self.model.norm({name: p.grad for name, p in held.items() if p.grad is not None})
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(held.values(), self.settings.clip_norm, norm)
        return norm.detach()

    def finished(self) -> str:
        """Return why training is finished, or an empty string."""
        if self.state.stale >= self.settings.patience:
            return f"no better {self.settings.monitor} in {self.settings.patience} validations"
        if len(self.state.history) >= self.settings.epochs:
            return f"all {self.settings.epochs} epochs done"
        return ""

    def save_if_due(self, stop: GracefulStop, finished: bool = False) -> None:
        """Write a checkpoint when one is due or at the end, and stop where that is requested."""
        requested = stop.requested or 0
        wanted = int(finished or requested > 0 or self._due())
        if self.model.shard:
            wanted, requested = self.model.shard.agree([wanted, requested])
        if not wanted:
            return
        self.check_finite_losses()
        self.save()
        if requested:
            log.info("stop requested; the checkpoint is written, the same command resumes from it")
            if requested == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + requested)

    def check_pruned(self, trial: Trial | None) -> None:
        """Write a checkpoint and raise PrunedError where a search ends this run after the epochs so far."""
        if trial is None or self.state.step:
            return
        scores = scores_of(self.state.history, self.settings.monitor)
        if trial.is_pruned(scores):
            self.save()
            raise trial.end_pruned(scores, writes=not (self.model.shard and self.model.shard.rank))

    def _due(self) -> bool:
        least = self.settings.checkpoint_seconds
        return time.monotonic() - self.saved >= (max(least, _REST * self.writing) if least else 0)

    def save(self) -> None:
        """Write a checkpoint; all of several processes take part, and the first one writes."""
        started = time.monotonic()
        release_gradients(self.model, self.optimiser)  # writing needs the memory
        self.state.save(self.checkpoint, self.model, self.optimiser)
        self.saved = time.monotonic()
        self.writing = self.saved - started

    def log_epoch(self, seconds: float) -> None:
        """Log the epoch's loss and scores."""
        state, row = self.state, self.state.history[-1]
        value, best = row[f"valid_{self.settings.monitor}"], state.best.valid
        log.info(
            "epoch %d: loss %.4f, %s, best %s at epoch %d, %d of %d without improvement, %.1f s",
            state.epoch,
            row["loss"],
            "not validated" if value is None else f"valid {self.settings.monitor} {value:.4f}",
            "none" if best is None else f"{best:.4f}",
            state.best.epoch,
            state.stale,
            self.settings.patience,
            seconds,
        )

    def check_finite_losses(self) -> None:
        """Raise UserError where a loss of the epoch so far is not finite."""
        values = self.state.losses[: self.state.step, : 1 + len(self.model.components)]
        bad = torch.nonzero(~torch.isfinite(values).all(1)).flatten().tolist()
        if bad:
            by_name = zip(self.model.components, values[bad[0], 1:].tolist(), strict=True)
            wrong = [name for name, value in by_name if not math.isfinite(value)]
            raise DivergedError(self._not_finite(wrong, bad[0]))

    def check_finite(self, loss: Loss) -> None:
        """Raise UserError where the loss of this step is not finite."""
        if not torch.isfinite(loss.total):
            wrong = [name for name, value in loss.components.items() if not torch.isfinite(value)]
            raise DivergedError(self._not_finite(wrong, self.state.step))

    def _not_finite(self, wrong: list[str], step: int) -> str:
        state, named = self.state, list(self.model.named_parameters())
        culprits = [f"parameter {name}" for name, p in named if not torch.isfinite(p).all()]
        if self.model.shard:
            culprits = self.model.shard.union(culprits)
        if not culprits and step == state.step:
            self.save()
        suspects = culprits or list(self.model.suspects())
        norms = ", ".join(f"{name} {float(self.model.norm({name: p.detach()})):.4g}" for name, p in named)
        return (
            f"epoch {state.epoch}, batch {step * self.per_step + 1}: the loss is not finite, "
            f"in {', '.join(wrong) or 'the sum of its components'}; "
            f"cause: {', '.join(suspects) or 'not a parameter; check the features'}. "
            f"Norms of the parameters: {norms}. {self.checkpoint.location_note()}"
            "Lower training.lr or check the features, and run again."
        )
