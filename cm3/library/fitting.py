"""Training of CM3, a baseline or a model of another package on ids and arrays."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from cm3.baselines.base import Baseline, ClosedForm, NetworkBaseline
from cm3.baselines.inputs import Inputs
from cm3.baselines.train import build_network, scored_solution
from cm3.common.device import select_device
from cm3.common.errors import UserError
from cm3.common.strict import validate
from cm3.config import Model, Training, modality_weights
from cm3.evaluation.item_weights import ItemWeights
from cm3.evaluation.ranking import Validation
from cm3.library.features import Features, prepare_features, reduce_features
from cm3.library.ids import id_columns, id_texts, pair_matrix, places, rows_of
from cm3.library.new_items import ItemEncoder, item_encoder
from cm3.library.recommender import Recommender
from cm3.library.reranking import fit_reranking, parse_reranking
from cm3.model.graph import item_item_matrix
from cm3.model.model import CM3, build_model
from cm3.model.network import Network
from cm3.model.sampling import NegativeSampling, Sampler, derived_seed
from cm3.model_registry import parse_model
from cm3.model_spec import ModelSpec, Weighted
from cm3.training.checkpoint import NullCheckpoint
from cm3.training.loop import fit as fit_network

log = logging.getLogger("cm3.library")


def fit(
    interactions: Mapping[str, Sequence[Any]],
    features: Mapping[str, Any] | None = None,
    item_ids: Sequence[Any] | None = None,
    model: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    valid_share: float = 0.1,
    rerank: Mapping[str, Any] | None = None,
    reduce: Mapping[str, Any] | None = None,
) -> Recommender:
    """Train CM3, or the model that `model["name"]` names, and return it ready to recommend.

    A share of the interactions is held out for early stopping, never the only one of a user. Items without interactions
    (cold items) are embedded by their features and can be recommended like all others.

    Args:
        interactions: columns `user` and `item` of ids, one interaction per row: a dict of lists, a pandas or polars
            DataFrame or a pyarrow Table. Repeats count once. Ids are text or integers; 7, 7.0 and "7" are the same id. A
            missing id (None, NaN, NaT, an empty text) is an error.
        features: (I, d) vectors by modality, at least one: NumPy, torch, SciPy or lists; a row with NaN is a missing
            vector. Models that read interactions only ignore them.
        item_ids: the ids of the I rows; without features they may be left out: the items of the interactions.
        model: settings that differ from the defaults: of CM3 (`cm3.config.Model`), or with a name of another model
            (docs/baselines.md), such as {"name": "lightgcn", "n_layers": 2}.
        training: settings of `cm3.config.Training`, such as {"epochs": 50, "seed": 1, "device": "cuda"}.
        valid_share: share of the interactions that is held out, between 0 and 1.
        rerank: models whose scores order the first items of the lists anew (docs/reranking.md), such as
            {"by": ["cease", "itemknn-content"]} or {"by": {"ease": {"l2": 200}}, "top": 100}; the weights are chosen on the
            interactions that are held out. The keys are those of an experiment, without `of`. The models are trained
            with those of the `training` settings that they support and have no default of their own for.
        reduce: reduction by modality of wide features to fewer numbers before training (docs/extractors.md), such as
            {"image": {"method": "pca", "dim": 512}}. Vectors of new items are given unreduced and reduced in the same way.

    Raises:
        ValueError: shapes or ids that do not fit together, or missing ids.
        UserError: settings that are not valid, or a loss that is not finite.

    Example:
        >>> from cm3 import fit, recommend
        >>> rng = np.random.default_rng(0)
        >>> pairs = {"user": np.repeat(np.arange(20), 5), "item": rng.integers(0, 12, 100)}
        >>> vectors = {"text": rng.normal(size=(12, 8)), "image": rng.normal(size=(12, 4))}
        >>> shop = fit(pairs, vectors, range(12), {"embedding_dim": 4, "knn_k": 3}, {"epochs": 2, "device": "cpu"})
        >>> [len(items) for items in recommend(shop, ["0", "7"], k=3)]
        [3, 3]
        >>> popular = fit(pairs, model={"name": "mostpop"})
        >>> len(recommend(popular, "0", k=3))
        3
    """
    spec = parse_model(model or {}, "fit.model")
    chosen = _training(spec, training or {})
    if not 0 <= valid_share <= 1:
        raise ValueError(f"valid_share = {valid_share}: must be between 0 and 1")
    user_names, item_names = id_columns(interactions)
    names = sorted(set(item_names)) if item_ids is None and not features else id_texts(_given(item_ids), "item_ids")
    user_ids = sorted(set(user_names))
    shape = (len(user_ids), len(names))
    rows = rows_of(user_names, places(user_ids, "user"), "user"), rows_of(item_names, places(names, "item"), "item")
    users, items = np.unique(np.stack(rows), axis=1)
    held = _held_out(users, valid_share, chosen.seed)
    observed, valid = (pair_matrix(users[part], items[part], shape) for part in (~held, held))
    if not valid.nnz:
        raise ValueError(_nothing_held_out(len(users), len(user_ids), valid_share))
    data = _Data(users[~held], items[~held], observed, valid)
    device = select_device(chosen.device)
    settings, specs = parse_reranking(rerank, spec.name, chosen.monitor) if rerank is not None else (None, {})
    untrained = Recommender(user_ids, names, *_no_vectors(shape), pair_matrix(users, items, shape))
    vectors, projections = reduce_features(features or {}, reduce or {}, len(names))
    _check_weights({"fit.model": spec} | {f"fit.rerank.by.{name}": part for name, part in specs.items()}, vectors)
    # Before the model itself, whose training takes longer than those that help: a fault of theirs is reported first.
    parts = {
        name: _fitted(part, data, vectors, _part_training(part, chosen, training or {}), device, untrained)
        for name, part in specs.items()
    }
    parts = {name: replace(part, seen=None, encoder=None) for name, part in parts.items()}
    fitted = _fitted(spec, data, vectors, chosen, device, untrained)
    if fitted.encoder is not None:
        fitted = replace(fitted, encoder=replace(fitted.encoder, projections=projections))
    if settings is None:
        return fitted
    return replace(fitted, reranking=fit_reranking(fitted, parts, settings, data.observed, data.valid, chosen.monitor))


class _Data:
    """Training pairs (E,), their matrix (U, I), and the held-out matrix (U, I)."""

    def __init__(self, users: np.ndarray, items: np.ndarray, observed: sp.csr_matrix, valid: sp.csr_matrix) -> None:
        self.users, self.items, self.observed, self.valid = users, items, observed, valid


def _training(spec: ModelSpec, given: Mapping[str, Any]) -> Training:
    defaults = {**spec.training_defaults, **spec.presets["default"].get("training", {})}
    chosen = validate(Training, {**defaults, **given}, "fit.training")
    if chosen.warm_start or chosen.processes > 1 or chosen.select_on != "valid":
        raise ValueError("training: warm_start, processes and select_on work in the pipeline only; remove them")
    unused = [] if not spec.trains else [key for key in given if not spec.supports(key)]
    if unused:
        raise UserError(f"fit.training.{unused[0]}: not supported by {spec.name}; remove it")
    return chosen


def _check_weights(specs: Mapping[str, ModelSpec], features: Mapping[str, Any]) -> None:
    """Raise UserError for weights of other modalities than the features have; `specs` are by their place in messages."""
    for where, spec in specs.items():
        if features and isinstance(spec, Weighted):
            modality_weights(spec, list(features), where)


def _part_training(spec: ModelSpec, base: Training, given: Mapping[str, Any]) -> Training:
    shared = {key: value for key, value in given.items() if spec.supports(key) and key not in spec.training_defaults}
    same = {"seed": base.seed, "monitor": base.monitor, "device": base.device}
    return validate(Training, {**spec.training_defaults, **shared, **same}, "fit.training")


def _fitted(
    spec: ModelSpec,
    data: _Data,
    features: Mapping[str, Any],
    training: Training,
    device: torch.device,
    untrained: Recommender,
) -> Recommender:
    """Return a trained model; `untrained` has its ids and what users have seen."""
    vectors = prepare_features(_read(spec, features), len(untrained.item_ids), spec, device)
    if isinstance(spec, ClosedForm):
        return _solved(spec, data, vectors, training, device, untrained)
    fitted, encoder = _trained(spec, data, vectors, training, device)
    users, items = fitted.users.cpu().numpy(), fitted.items.cpu().numpy()
    return replace(untrained, users=users, items=items, history=fitted.history, encoder=encoder)


def _given(item_ids: Any) -> Any:
    if item_ids is None:
        raise ValueError("item_ids: the ids of the rows of the features are needed")
    return item_ids


def _read(spec: ModelSpec, features: Mapping[str, Any]) -> Mapping[str, Any]:
    if spec.reads_features and not features:
        raise ValueError(f"features: at least one modality is needed by {spec.name}")
    if features and not spec.reads_features:
        log.info("%s reads interactions only; the features are not used", spec.name)
        return {}
    return features


def _no_vectors(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    users, items = (np.zeros((n, 0), np.float32) for n in shape)
    return users, items


def _inputs(spec: ModelSpec, data: _Data, vectors: Features) -> Inputs:
    weights = modality_weights(spec, list(vectors.filled)) if isinstance(spec, Weighted) else {}
    return Inputs(data.observed, vectors.filled, vectors.neighbours, weights)


def _solved(
    spec: ClosedForm, data: _Data, vectors: Features, training: Training, device: torch.device, untrained: Recommender
) -> Recommender:
    inputs = _inputs(spec, data, vectors)
    solution = spec.solve(inputs, device)
    validation = Validation(data.valid, data.observed, training.monitor)
    history = scored_solution(solution, inputs, training, (validation, None)).history
    if isinstance(solution, ItemWeights):
        return replace(untrained, history=history, weights=solution)
    users, items = solution.users.cpu().numpy(), solution.items.cpu().numpy()
    return replace(untrained, users=users, items=items, history=history)


def _trained(
    spec: ModelSpec, data: _Data, vectors: Features, training: Training, device: torch.device
) -> tuple[Any, ItemEncoder | None]:
    network = _network(spec, data, vectors, training).to(device)
    device = next(network.parameters()).device
    sampler = Sampler(
        torch.from_numpy(data.users).to(device),
        torch.from_numpy(data.items).to(device),
        data.observed.shape[1],
        batch_size=training.batch_size,
        negative_sampling=_negatives(spec, network),
        dedup_pairs=getattr(spec, "dedup_pairs", False),
        seed=derived_seed(training.seed, 1),
    )
    validation = Validation(data.valid, data.observed, training.monitor, device)
    fitted = fit_network(network, sampler, validation, training, NullCheckpoint())
    if not isinstance(network, CM3) or not isinstance(spec, Model):
        return fitted, None
    weights = modality_weights(spec, list(vectors.filled))
    filled = {name: (vectors.filled[name], vectors.ok[name]) for name in vectors.filled}
    return fitted, item_encoder(network, fitted.parameters, weights, filled, vectors.searched, {})


def _negatives(spec: ModelSpec, network: Network) -> NegativeSampling:
    return spec.uniformity_items if isinstance(spec, Model) else network.negative_sampling


def _network(spec: ModelSpec, data: _Data, vectors: Features, training: Training) -> Network:
    if isinstance(spec, Model):
        weights = modality_weights(spec, list(vectors.filled))
        edges = [(items, others) for items, others, _ in vectors.neighbours.values()]
        graph = item_item_matrix(edges, list(weights.values()), data.observed.shape[1])
        return build_model(list(vectors.filled.values()), data.observed, graph, spec, training.seed, training.precision)
    if isinstance(spec, NetworkBaseline):
        return build_network(spec, _inputs(spec, data, vectors), training.seed)
    raise TypeError(f"{type(spec).__name__} is neither CM3 nor a {Baseline.__name__}")


def _nothing_held_out(interactions: int, users: int, share: float) -> str:
    message = f"valid_share = {share} holds out none of {interactions} interactions for validation"
    if interactions == users:
        return f"{message}: each of the {users} users has only one, which is needed for training; give users more interactions"
    return f"{message}; raise it"


def _held_out(users: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which interactions are held out: each with probability `share`, but one of every user never is."""
    draws = np.random.default_rng(derived_seed(seed, 2)).random(len(users))
    highest = np.lexsort((draws, users))[np.cumsum(np.bincount(users)) - 1]
    held = draws < share
    held[highest] = False
    return held
