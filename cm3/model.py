"""The CM3 network: projections, spherical fusion, propagation over both graphs, and the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.config import Model
from cm3.fusion import reference_slerp, slerp, spherical_bezier
from cm3.graph import SparseMatrix, add_neighbours, propagate, user_item_matrix
from cm3.losses import alignment, calibrated_uniformity, uniformity
from cm3.network import Embeddings, Loss, Network
from cm3.sampling import Batch, derived_seed, mixing_parameters
from stages.errors import UserError


@dataclass(frozen=True)
class FusedEmbeddings(Embeddings):
    """What a forward gives: users (U, (M+1)d) and items (I, (M+1)d), not normalised, and fused (I, d) of unit norm."""

    fused: Tensor


class Modality(nn.Module):
    """Projects one modality's features x, (I, d_m), onto its stream h and its control point c, both (I, d).

    h = normalise(W2 LeakyReLU(W1 x + b1)), c = normalise(V x + a).
    """

    features: Tensor

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
        both = functional.linear(self.features, weight, torch.cat([self.hidden.bias, self.point.bias]))
        inner, control = both.split([self.hidden.out_features, self.point.out_features], dim=1)
        stream = self.output(functional.leaky_relu(inner))
        return functional.normalize(stream, dim=1), functional.normalize(control, dim=1)


class CM3(Network):
    """CM3 over U users, I items and M >= 1 modalities (arXiv 2508.01226).

    Each entity has M + 1 streams of width d, one per modality and one fused. Weights of users are drawn from
    N(0, 2 / (U + d)), which sets how fast Adam turns them, as they are normalised before use.
    """

    parts = ("alignment", "user_uniformity", "item_uniformity")

    def __init__(
        self, features: Sequence[Tensor], interactions: sp.csr_matrix, item_graph: sp.csr_matrix, settings: Model
    ) -> None:
        """Take (I, d_m) float features per modality, (U, I) training interactions, and S (I, I).

        Parameters come from torch's global generator.
        """
        super().__init__()
        self.settings = settings
        n_users, self.n_items = interactions.shape
        d, streams = settings.embedding_dim, len(features) + 1
        self.modalities = nn.ModuleList(Modality(x, settings.hidden_factor * d, d) for x in features)
        self.users = nn.Parameter(torch.randn(n_users, streams, d) * math.sqrt(2 / (n_users + d)))
        self.stream_logits = nn.Parameter(torch.randn(n_users, streams) * math.sqrt(2 / (n_users + streams)))
        self.adjacency = SparseMatrix(user_item_matrix(interactions))
        self.item_graph = SparseMatrix(item_graph)
        self.item_graph_transposed = SparseMatrix(item_graph.T.tocsr())
        self.interpolate = {"safe": slerp, "reference": reference_slerp}[settings.slerp]

    def forward(self, t: Tensor) -> FusedEmbeddings:
        """Embed every user and item; `t` (I,) places each item on its fusion curve, 0.5 in evaluation."""
        streams, points = zip(*(modality() for modality in self.modalities), strict=True)
        fused = spherical_bezier(torch.stack(points), t, self.interpolate)
        n_users = len(self.users)
        users = functional.normalize(self.users, dim=2).flatten(1)
        nodes = propagate(
            self.adjacency, torch.cat([users, torch.cat([*streams, fused], 1)]), self.settings.n_ui_layers
        )
        weights = self.stream_logits.softmax(1)
        users = (nodes[:n_users].unflatten(1, (*weights.shape[1:], -1)) * weights[:, :, None]).flatten(1)
        items = add_neighbours(
            self.item_graph, self.item_graph_transposed, nodes[n_users:], self.settings.n_mm_layers
        )  # fmt: skip
        return FusedEmbeddings(users, items, fused)

    def training_embeddings(self, seed: int) -> FusedEmbeddings:
        """Return a forward whose t ~ Beta(alpha, alpha), one draw per item, come from `seed`."""
        return self(mixing_parameters(self.settings.alpha, self.n_items, self.users.device, seed))

    def loss(self, embeddings: FusedEmbeddings, batch: Batch) -> Loss:
        """Return alignment + gamma (uniformity of users + calibrated uniformity of items) / 2 over a batch."""
        align = alignment(_unit_rows(embeddings.users, batch.users), _unit_rows(embeddings.items, batch.items))
        users, items = batch.spread_users, batch.spread_items
        user_uniformity = uniformity(_unit_rows(embeddings.users, users.ids), counts=users.counts)
        item_uniformity = calibrated_uniformity(
            _unit_rows(embeddings.items, items.ids), self._similarity(embeddings.fused, items.ids), counts=items.counts
        )
        total = align + self.settings.gamma * (user_uniformity + item_uniformity) / 2
        return Loss(total, dict(zip(self.parts, (align, user_uniformity, item_uniformity), strict=True)))

    def _similarity(self, fused: Tensor, items: Tensor) -> Tensor:
        settings = self.settings
        with torch.set_grad_enabled(torch.is_grad_enabled() and not settings.detach_similarity):
            rows = _unit_rows(fused, items)
            # In place: a (B, B) matrix is the largest thing in a step.
            return (rows @ rows.T).clamp_(settings.min_sim, settings.max_sim)

    @torch.no_grad()
    def embed(self) -> FusedEmbeddings:
        """Return the embeddings that are evaluated: t = 0.5 for every item."""
        return self(torch.full((self.n_items,), 0.5, device=self.users.device))

    def suspects(self) -> tuple[str, ...]:
        """Name the reference's slerp where it is in use."""
        return (
            ("model.slerp: reference, which is undefined for equal vectors (use safe)",)
            if self.settings.slerp == "reference"
            else ()
        )


def _unit_rows(table: Tensor, ids: Tensor) -> Tensor:
    # `embedding` sums repeated rows in one order in its backward, which indexing does not promise.
    return functional.normalize(functional.embedding(ids, table), dim=1)


def fill_missing(embedding: np.ndarray, ok: np.ndarray, missing: str, name: str) -> np.ndarray:
    """Return (I, d) features whose rows that are not ok are the mean of the others (`mean`) or zero (`zero`).

    Raises:
        UserError: no row is ok; `name` says of what.
    """
    if not ok.any():
        raise UserError(f"{name}: none of its {len(ok)} items has a vector; leave this modality out or mend its inputs")
    filled = embedding.copy()
    filled[~ok] = embedding[ok].mean(0, dtype=np.float64) if missing == "mean" else 0
    return filled


def seeded(
    features: Sequence[np.ndarray], interactions: sp.csr_matrix, item_graph: sp.csr_matrix, settings: Model, seed: int
) -> CM3:
    """Return a CM3 whose initial weights depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed))
        return CM3([torch.from_numpy(x) for x in features], interactions, item_graph, settings)
