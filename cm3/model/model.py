"""The CM3 network: projections, spherical fusion, propagation over both graphs, and the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cm3.common.arrays import blocks, mean_of_rows, zeros
from cm3.common.device import float32_arithmetic
from cm3.common.errors import UserError
from cm3.config import Model
from cm3.model.fused_slerp import fused_slerp
from cm3.model.fusion import lerp, reference_slerp, slerp, spherical_bezier
from cm3.model.graph import SparseMatrix, add_neighbours, user_item_matrix
from cm3.model.lookup import lookup
from cm3.model.losses import alignment
from cm3.model.network import Embeddings, Loss, Network, backward
from cm3.model.pair_potential import tiled_calibrated_uniformity, tiled_uniformity
from cm3.model.sampling import Batch, derived_seed, mixing_parameters
from cm3.model.streams import propagate_streams


@dataclass(frozen=True)
class FusedEmbeddings(Embeddings):
    """Output of a forward pass: users (U, (M+1)d), items (I, (M+1)d), not normalised, and fused (I, d) of unit norm."""

    fused: Tensor


@dataclass(frozen=True)
class _StepEmbeddings:
    users: list[Tensor]  # of each batch's distinct users
    items: Tensor
    fused: Tensor


_SLOPE = 0.01  # of LeakyReLU below 0

LARGE_ACTIVATION = 2**25
"""Bytes of the hidden activations of all items from which the CPU computes them again backward and does not keep them."""

BACKWARD_ROWS = 2**15
"""Items of one product backward with features in bfloat16 on the CPU."""


class Modality(nn.Module):
    """Projects one modality's features x, (I, d_m), onto its stream h and its control point c, both (I, d).

    h = normalise(W2 LeakyReLU(W1 x + b1)), c = normalise(V x + a).

    Attributes:
        tf32: whether a GPU may compute the products with the features in TF32.
    """

    features: Tensor
    tf32: bool = False

    def __init__(self, features: Tensor, hidden_dim: int, d: int) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        self.hidden = nn.Linear(features.shape[1], hidden_dim)
        self.output = nn.Linear(hidden_dim, d, bias=False)
        self.point = nn.Linear(features.shape[1], d)
        nn.init.xavier_normal_(self.point.weight)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the stream and the control point, (I, d) each, of unit norm."""
        # The features are by far the widest factor: both maps read them in one product.
        weight = torch.cat([self.hidden.weight, self.point.weight])
        bias = torch.cat([self.hidden.bias, self.point.bias])
        if self.features.dtype == torch.bfloat16:
            both = _BFloat16Linear.apply(self.features, weight, bias)
        elif self.tf32:
            both = _TF32Linear.apply(self.features, weight, bias)
        else:
            both = functional.linear(self.features, weight, bias)
        stream, control = _HiddenLayer.apply(both, self.output.weight)
        return functional.normalize(stream, dim=1), functional.normalize(control, dim=1)


class _HiddenLayer(torch.autograd.Function):
    """LeakyReLU(h) W^T of the first columns h of a table, (I, d), and its other columns as they are.

    The gradient in the table is written into the table itself. Large activations are computed again on the CPU.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        width = weight.shape[1]
        activation = functional.leaky_relu(both[:, :width], _SLOPE)
        kept = both.device.type != "cpu" or activation.nbytes < LARGE_ACTIVATION
        ctx.save_for_backward(both, weight, activation if kept else None)
        return functional.linear(activation, weight), both[:, width:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_stream: Tensor, by_rest: Tensor) -> tuple[Tensor, Tensor]:
        both, weight, activation = ctx.saved_tensors
        inner = both[:, : weight.shape[1]]
        if activation is None:
            activation = functional.leaky_relu(inner, _SLOPE)
        by_weight = by_stream.T @ activation
        del activation
        # Nothing reads the table after this.
        torch.ops.aten.leaky_relu_backward(by_stream @ weight, inner, _SLOPE, False, grad_input=inner)
        both[:, weight.shape[1] :] = by_rest
        return both, by_weight


class _BFloat16Linear(torch.autograd.Function):
    """x W^T + b for constant x in bfloat16. Backward, the CPU's library copies x into another order: some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.linear(x, weight.bfloat16()).to(weight.dtype).add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        size = BACKWARD_ROWS if x.device.type == "cpu" else max(len(x), 1)
        by_weight = grad.new_zeros(grad.shape[1], x.shape[1])
        for rows in blocks(len(x), size):
            by_weight += grad[rows].bfloat16().T @ x[rows]
        return None, by_weight, grad.sum(0)


class _TF32Linear(torch.autograd.Function):
    """x W^T + b for constant x, its product and that of the gradient of W in TF32 where the device has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with float32_arithmetic(tf32=True):
            return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        with float32_arithmetic(tf32=True):
            by_weight = grad.T @ x
        return None, by_weight, grad.sum(0)


class CM3(Network):
    """CM3 over U users, I items and M >= 1 modalities (arXiv 2508.01226).

    Each user and item has M + 1 streams of width d, one per modality and one fused. Initial values of users are from
    N(0, 2 / (U + d)); as they are normalised before use, their scale sets how fast Adam rotates them.

    Attributes:
        bfloat16_pairs: whether the uniformity losses compute their products in bfloat16.
    """

    components = ("alignment", "user_uniformity", "item_uniformity")
    supports_ddp = True
    split_parameters = ("users",)
    bfloat16_pairs = False
    supports_cuda_graph = True

    def __init__(
        self, features: Sequence[Tensor], interactions: sp.csr_matrix, item_graph: sp.csr_matrix, settings: Model
    ) -> None:
        """Take (I, d_m) float features per modality, (U, I) training interactions, and S (I, I).

        Parameters come from torch's global generator.
        """
        super().__init__()
        self.settings = settings
        self.stream_names = [*map(str, range(1, len(features) + 1)), "fused"]
        self.n_users, self.n_items = interactions.shape
        d, streams = settings.embedding_dim, len(features) + 1
        self.modalities = nn.ModuleList(Modality(x, settings.hidden_factor * d, d) for x in features)
        self.users = nn.Parameter(torch.randn(self.n_users, streams, d) * math.sqrt(2 / (self.n_users + d)))
        self.stream_logits = nn.Parameter(torch.randn(self.n_users, streams) * math.sqrt(2 / (self.n_users + streams)))
        self.adjacency = SparseMatrix(user_item_matrix(interactions))
        self.item_graph = SparseMatrix(item_graph)
        self.item_graph_transposed = SparseMatrix(item_graph.T.tocsr())
        arc = {"safe": slerp, "fused": fused_slerp, "reference": reference_slerp}[settings.slerp]
        self.interpolate = lerp if settings.fusion == "linear" else arc
        if settings.fusion == "concat":
            self.mix = nn.Linear(len(features) * d, d)

    def forward(self, t: Tensor) -> FusedEmbeddings:
        """Embed every user and item; `t` (I,) is the position of each item on its fusion curve, 0.5 in evaluation."""
        streams, fused = self.item_streams(t)
        users, items = self._propagated(streams)
        return FusedEmbeddings(self._weighted(users, self.stream_logits), items, fused)

    def item_streams(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the items before propagation, (I, (M+1)d), and the fused points, (I, d); `t` as in `forward`."""
        streams, points = zip(*(modality() for modality in self.modalities), strict=True)
        fused = self._fused(points, t)
        return torch.cat([*streams, fused], 1), fused

    def _fused(self, points: Sequence[Tensor], t: Tensor) -> Tensor:
        fusion = self.settings.fusion
        if fusion == "mean":
            return functional.normalize(torch.stack(list(points)).mean(0), dim=1)
        if fusion == "concat":
            return functional.normalize(self.mix(torch.cat(list(points), 1)), dim=1)
        curve = spherical_bezier(torch.stack(list(points)), t, self.interpolate)
        return functional.normalize(curve, dim=1) if fusion == "linear" else curve

    def _propagated(self, streams: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return users, all or those of `ids`, and items (I, (M+1)d) after propagation over both graphs.

        Each of several processes propagates its streams, and gets the others' from them.
        """
        shard, width, layers = self.shard, streams.shape[1], self.settings.n_ui_layers
        if shard is None:
            users, items = propagate_streams(self.adjacency, self.users, streams, layers, ids)
            return users, self._with_neighbours(items)
        d, own = self.settings.embedding_dim, shard.pairs(len(self.stream_names))
        columns = slice(own.start * d, own.stop * d)
        users, items = propagate_streams(self.adjacency, self.users, streams[:, columns], layers, ids)
        return shard.join(users, columns, width), shard.join(self._with_neighbours(items), columns, width)

    def _weighted(self, users: Tensor, logits: Tensor) -> Tensor:
        """Return users (n, S d) times their weights, softmax of (n, S); outside autograd the products replace them."""
        weights = logits.softmax(1)
        streams = users.unflatten(1, (weights.shape[1], -1))
        found: Tensor = torch.mul(streams, weights[:, :, None], out=None if torch.is_grad_enabled() else streams)
        return found.flatten(1)

    def _with_neighbours(self, items: Tensor) -> Tensor:
        if not self.settings.item_graph:
            return items
        return add_neighbours(self.item_graph, self.item_graph_transposed, items, self.settings.n_mm_layers)

    def training_embeddings(self, seed: int) -> FusedEmbeddings:
        """Return a forward pass with t ~ Beta(alpha, alpha), one value per item, sampled by `seed`."""
        found: FusedEmbeddings = self(self.sample_t(seed))
        return found

    def random_draws(self, seed: int) -> tuple[Tensor, ...]:
        """Return the positions on the fusion curves."""
        return (self.sample_t(seed),)

    def sample_t(self, seed: int) -> Tensor:
        """Return a training step's positions on the fusion curves, (I,) from Beta(alpha, alpha)."""
        return mixing_parameters(self.settings.alpha, self.n_items, self.users.device, seed)

    def loss(self, embeddings: FusedEmbeddings, batch: Batch) -> Loss:
        """Return alignment + gamma (uniformity of users + calibrated uniformity of items) / 2 over a batch."""
        return self._loss(lookup(embeddings.users, batch.counted_users.ids), embeddings.items, embeddings.fused, batch)

    def backward(self, batches: Sequence[Batch], seed: int) -> Loss:
        """Return the mean loss of `batches`, its gradient added to the parameters'. Embeds only the users of the batches."""
        return self.backward_drawn(batches, self.random_draws(seed))

    def backward_drawn(self, batches: Sequence[Batch], draws: Sequence[Tensor]) -> Loss:
        """Return `backward` of given positions on the fusion curves."""
        (t,) = draws
        held = [batch.counted_users.ids for batch in batches]
        if len(held) > 1 and sum(len(some) for some in held) >= self.n_users:
            return backward(self(t), [partial(self._whole_loss, batch) for batch in batches], self.is_large())
        # Not in a local variable: `backward` releases the embeddings.
        losses = [partial(self._step_loss, n, batch) for n, batch in enumerate(batches)]
        return backward(self._step_embeddings(held, t), losses, self.is_large())

    def _step_embeddings(self, held: Sequence[Tensor], t: Tensor) -> "_StepEmbeddings":
        streams, fused = self.item_streams(t)
        ids = torch.cat(list(held))
        users, items = self._propagated(streams, ids)
        users = self._weighted(users, lookup(self.stream_logits, ids))
        return _StepEmbeddings(list(users.split([len(some) for some in held])), items, fused)

    def _whole_loss(self, batch: Batch, embeddings: FusedEmbeddings) -> Loss:
        return self.loss(embeddings, batch)

    def _step_loss(self, n: int, batch: Batch, embeddings: "_StepEmbeddings") -> Loss:
        return self._loss(embeddings.users[n], embeddings.items, embeddings.fused, batch)

    def _loss(self, users: Tensor, items: Tensor, fused: Tensor, batch: Batch) -> Loss:
        negatives = batch.counted_negatives
        users = functional.normalize(users, dim=1)
        # Positives and negatives in one gather, whose gradient is then one table.
        held = functional.normalize(lookup(items, torch.cat([batch.items, negatives.ids])), dim=1)
        positives, others = held.split([len(batch.items), len(negatives.ids)])
        align = self._alignment(lookup(users, batch.counted_users.positions), positives)
        shared: Any = {"shard": self.shard, "bfloat16": self.bfloat16_pairs}
        user_uniformity = tiled_uniformity(users, counts=batch.counted_users.counts, **shared)
        if self.settings.calibration:
            points = lookup(fused.detach() if self.settings.detach_similarity else fused, negatives.ids)
            clamp = (self.settings.min_sim, self.settings.max_sim)
            item_uniformity = tiled_calibrated_uniformity(others, points, clamp, counts=negatives.counts, **shared)
        else:
            item_uniformity = tiled_uniformity(others, counts=negatives.counts, **shared)
        total = align + self.settings.gamma * (user_uniformity + item_uniformity) / 2
        return Loss(total, dict(zip(self.components, (align, user_uniformity, item_uniformity), strict=True)))

    def _alignment(self, users: Tensor, items: Tensor) -> Tensor:
        if self.shard is None:
            return alignment(users, items)
        mine = self.shard.pairs(len(users))
        return self.shard.sum((users[mine] - items[mine]).square().sum() / len(users))

    @torch.no_grad()
    def embed(self) -> FusedEmbeddings:
        """Return the embeddings for evaluation: t = 0.5 for every item."""
        found: FusedEmbeddings = self(torch.full((self.n_items,), 0.5, device=self.users.device))
        return found

    @torch.no_grad()
    def curves(self, embedded: FusedEmbeddings | None = None) -> dict[str, float]:
        """Return the mean weight of each stream over the users, `stream_weight_NAME`, and `fused_cosine`.

        The latter is the mean cosine between the fused points of two items, t = 0.5. Near 1 all items have the same
        point, and calibrated uniformity equals plain uniformity.
        """
        weights = self.stream_logits.softmax(1).mean(0).tolist()
        found = {f"stream_weight_{name}": value for name, value in zip(self.stream_names, weights, strict=True)}
        n = self.n_items
        if embedded is None:
            points = [modality()[1] for modality in self.modalities]
            fused = self._fused(points, torch.full((n,), 0.5, device=self.users.device))
        else:
            fused = embedded.fused
        fused = functional.normalize(fused, dim=1)
        if n > 1:
            found["fused_cosine"] = float((fused.sum(0).square().sum() - n) / (n * (n - 1)))
        return found

    def suspects(self) -> tuple[str, ...]:
        """Return the setting of the reference's slerp where it is used."""
        return (
            ("model.slerp: reference, which is undefined for equal vectors (use safe)",)
            if self.settings.slerp == "reference"
            else ()
        )


def fill_missing(embedding: np.ndarray, ok: np.ndarray, missing: str, name: str) -> np.ndarray:
    """Fill the rows of (I, d) features that are not ok with the mean of the others (`mean`) or zero (`zero`), in place.

    Raises:
        UserError: no row is ok; `name` is the file's name in the message.
    """
    if not ok.any():
        raise UserError(f"{name}: none of its {len(ok)} items has a vector; leave this modality out or fix its inputs")
    if not ok.all():
        embedding[~ok] = mean_of_rows(embedding, ok) if missing == "mean" else 0
    return embedding


def build_model(
    features: Sequence[np.ndarray],
    interactions: sp.csr_matrix,
    item_graph: sp.csr_matrix,
    settings: Model,
    seed: int,
    precision: str = "float32",
) -> CM3:
    """Return a CM3 whose initial weights depend on `seed` alone; torch's global generator is not changed.

    With `precision` bfloat16 the features are stored in that type, and so are the factors of their products and of those
    of pairs in the losses. With tf32 a GPU computes the products of float32 features in TF32.
    """
    given = [_bfloat16(x) if precision == "bfloat16" else torch.from_numpy(x) for x in features]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed))
        model = CM3(given, interactions, item_graph, settings)
    model.bfloat16_pairs = precision == "bfloat16"
    for modality in model.modalities:
        if isinstance(modality, Modality):
            modality.tf32 = precision == "tf32"
    return model


def _bfloat16(x: np.ndarray) -> Tensor:
    rounded = torch.from_numpy(zeros(x.shape, np.int16)).view(torch.bfloat16)
    for rows in blocks(len(x)):
        rounded[rows] = torch.from_numpy(x[rows])
    return rounded
