"""The training loop: step, validate, checkpoint, log."""

import logging
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from cm3.checkpoint import Checkpoint
from cm3.config import Training
from cm3.network import Embeddings, Loss, Network
from cm3.ranking import Validation
from cm3.sampling import Batch, Sampler, derived_seed
from cm3.schedule import Stopping, lr_factor
from stages.errors import UserError

log = logging.getLogger(__name__)

_LOG_SECONDS = 20.0


@dataclass
class Best:
    """The epoch that scored best in validation."""

    epoch: int = 0
    valid: float | None = None
    test: float | None = None


@dataclass
class State:
    """Where the loop stands: what, beside tensors, a checkpoint holds."""

    epoch: int = 1
    batch: int = 0
    stale: int = 0
    best: Best = field(default_factory=Best)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Fitted:
    """A finished run: the best epoch's parameters and embeddings, and how it got there."""

    parameters: dict[str, Tensor]
    users: Tensor
    items: Tensor
    best: Best
    history: list[dict[str, Any]]
    stopped: str
    seconds_per_epoch: float


def fit(
    model: Network,
    sampler: Sampler,
    validation: Validation,
    settings: Training,
    checkpoint: Checkpoint,
    test: Validation | None = None,
) -> Fitted:
    """Train until validation has not improved for `settings.patience` validations in a row, or epochs run out.

    Goes on from the checkpoint if there is one; on the CPU the result is then bit for bit that of a run never stopped.

    Args:
        model: initialised, on the device to train on.
        sampler: of the training pairs, on the same device.
        validation: scores the monitored metric on the validation split.
        settings: how to train.
        checkpoint: where the state is kept between batches.
        test: scores the same metric on the test split each epoch; only for `select_on: test`.

    Raises:
        UserError: the loss is not finite; the message names the epoch, the batch and the culprit.
        SystemExit: SIGTERM asked to stop; the checkpoint is written.
    """
    device = sampler.users.device
    optimiser = torch.optim.Adam(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    state, best_tensors = State(), dict[str, Tensor]()
    parts = torch.zeros(sampler.n_batches, 1 + len(model.parts), device=device)
    stored = checkpoint.load()
    if stored:
        state, best_tensors = _restore(*stored, model, optimiser, parts)
        log.info("going on from the checkpoint: epoch %d, after batch %d of %d", state.epoch, state.batch, len(parts))
    saved, seconds, epochs_here = time.monotonic(), 0.0, 0
    stopped = _finished(state, settings)
    with Stopping() as stopping:
        while not stopped:
            started = logged = time.monotonic()
            embeddings, first = None, state.batch
            model.begin_epoch(derived_seed(settings.seed, state.epoch))
            for number, batch in enumerate(sampler.epoch(state.epoch, first), start=first):
                embeddings = _step(model, optimiser, batch, settings, state.epoch, number, parts)
                state.batch = number + 1
                now = time.monotonic()
                if now - logged >= _LOG_SECONDS:
                    logged = now
                    pace = (now - started) / (state.batch - first)
                    left = pace * (len(parts) - state.batch)
                    log.info("epoch %d: batch %d of %d, %.0f s left in it", state.epoch, state.batch, len(parts), left)
                due = stopping.asked or now - saved >= settings.checkpoint_seconds
                if due and state.batch < len(parts):
                    _require_finite_parts(parts[: state.batch], model, state.epoch)
                    _save(checkpoint, state, model, optimiser, parts, best_tensors)
                    saved = time.monotonic()
                    _stop_if(stopping)
            _require_finite_parts(parts, model, state.epoch)
            _validate(state, model, embeddings, parts, settings, validation, test, best_tensors)
            seconds, epochs_here = seconds + time.monotonic() - started, epochs_here + 1
            _log_epoch(state, settings, time.monotonic() - started)
            stopped = _finished(state, settings)
            state.epoch, state.batch = state.epoch + 1, 0
            if stopped or stopping.asked or time.monotonic() - saved >= settings.checkpoint_seconds:
                _save(checkpoint, state, model, optimiser, parts, best_tensors)
                saved = time.monotonic()
                _stop_if(stopping)
    parameters = {name: best_tensors[f"best.{name}"] for name, _ in model.named_parameters()}
    return Fitted(
        parameters, best_tensors["best_users"], best_tensors["best_items"], state.best, state.history, stopped,
        seconds / max(epochs_here, 1),
    )  # fmt: skip


def _step(
    model: Network,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    settings: Training,
    epoch: int,
    number: int,
    parts: Tensor,
) -> Embeddings:
    device = parts.device
    for group in optimiser.param_groups:
        group["lr"] = settings.lr * lr_factor(settings, epoch, number, len(parts))
    optimiser.zero_grad(set_to_none=True)
    embeddings: Embeddings = model.training_embeddings(derived_seed(settings.seed, epoch, number))
    loss = model.loss(embeddings, batch)
    parts[number] = torch.stack([loss.total, *(loss.parts[name] for name in model.parts)]).detach()
    if device.type == "cpu":
        _require_finite(loss, model, epoch, number)
    loss.total.backward()
    if settings.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimiser.step()
    return embeddings


def _stop_if(stopping: Stopping) -> None:
    if stopping.asked:
        log.info("asked to stop; the checkpoint is written, the same command goes on from it")
        raise SystemExit(128 + signal.SIGTERM)


def _finished(state: State, settings: Training) -> str:
    if state.stale >= settings.patience:
        return f"no better {settings.monitor} in {settings.patience} validations"
    if len(state.history) >= settings.epochs:
        return f"all {settings.epochs} epochs done"
    return ""


def _validate(
    state: State,
    model: Network,
    last: Embeddings | None,
    parts: Tensor,
    settings: Training,
    validation: Validation,
    test: Validation | None,
    best_tensors: dict[str, Tensor],
) -> None:
    means = dict(zip(("loss", *model.parts), parts.cpu().double().mean(0).tolist(), strict=True))
    row: dict[str, Any] = {"epoch": state.epoch, **means, f"valid_{settings.monitor}": None}
    if test is not None:
        row[f"test_{settings.monitor}"] = None
    state.history.append(row)
    if state.epoch % settings.validate_every and state.epoch != settings.epochs:
        return
    embeddings = last if settings.eval_embeddings == "last_batch" and last is not None else model.embed()
    users, items = embeddings.users.detach(), embeddings.items.detach()
    value = validation.score(users, items)
    if settings.round_valid is not None:
        value = round(value, settings.round_valid)
    row[f"valid_{settings.monitor}"] = value
    tested = None
    if test is not None:
        row[f"test_{settings.monitor}"] = tested = test.score(users, items)
    state.stale += 1
    if state.best.valid is None or value > state.best.valid:
        state.best, state.stale = Best(state.epoch, value, tested), 0
        best_tensors.update({f"best.{name}": p.detach().clone() for name, p in model.named_parameters()})
        best_tensors.update(best_users=users.clone(), best_items=items.clone())


def _log_epoch(state: State, settings: Training, seconds: float) -> None:
    row = state.history[-1]
    value = row[f"valid_{settings.monitor}"]
    log.info(
        "epoch %d: loss %.4f, %s, best %s at epoch %d, %d of %d without improvement, %.1f s",
        state.epoch,
        row["loss"],
        "not validated" if value is None else f"valid {settings.monitor} {value:.4f}",
        "none" if state.best.valid is None else f"{state.best.valid:.4f}",
        state.best.epoch,
        state.stale,
        settings.patience,
        seconds,
    )


def _save(
    checkpoint: Checkpoint,
    state: State,
    model: Network,
    optimiser: torch.optim.Optimizer,
    parts: Tensor,
    best_tensors: dict[str, Tensor],
) -> None:
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{index}.{name}": value for name, value in values.items()})
    checkpoint.save({**tensors, **best_tensors, "parts": parts}, asdict(state))


def _restore(
    tensors: dict[str, Tensor],
    stored: dict[str, Any],
    model: Network,
    optimiser: torch.optim.Optimizer,
    parts: Tensor,
) -> tuple[State, dict[str, Tensor]]:
    state = State(**{**stored, "best": Best(**stored["best"])})
    parts.copy_(tensors["parts"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    whole = optimiser.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            whole["state"].setdefault(int(index), {})[key] = value
    optimiser.load_state_dict(whole)
    device = parts.device
    return state, {name: value.to(device) for name, value in tensors.items() if name.startswith("best")}


def _require_finite_parts(parts: Tensor, model: Network, epoch: int) -> None:
    bad = torch.nonzero(~torch.isfinite(parts).all(1)).flatten().tolist()
    if bad:
        values = parts[bad[0], 1:].tolist()
        names = [name for name, value in zip(model.parts, values, strict=True) if not math.isfinite(value)]
        raise UserError(_not_finite(names, model, epoch, bad[0]))


def _require_finite(loss: Loss, model: Network, epoch: int, batch: int) -> None:
    if not torch.isfinite(loss.total):
        names = [name for name, value in loss.parts.items() if not torch.isfinite(value)]
        raise UserError(_not_finite(names, model, epoch, batch))


def _not_finite(names: list[str], model: Network, epoch: int, batch: int) -> str:
    culprits = [f"parameter {name}" for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    suspects = culprits or list(model.suspects())
    return (
        f"epoch {epoch}, batch {batch + 1}: the loss is not finite, in {', '.join(names) or 'its sum'}; "
        f"culprit: {', '.join(suspects) or 'none of the parameters; look at the features'}. "
        "Lower training.lr or check the features, and run again."
    )
