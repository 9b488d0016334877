"""LIRDRec: items represented by their features alone, with learnt weights of the modalities per user."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.fft
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.baselines.inputs import Inputs
from cm3.baselines.lirdrec import LIRDRec
from cm3.baselines.networks.layers import bpr_loss, by_name, lookup
from cm3.model.graph import SparseMatrix, add_neighbours, item_item_matrix, propagate, user_item_matrix
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch

_EPOCHS = 10_000
"""Epochs with a weight of their own; later ones have the last, which is 0 for any decay below 1."""


class DirectRepresentations(Network):
    """Zhou et al., Learning Item Representations Directly from Multimodal Features for Effective Recommendation, 2025.

    arXiv 2505.04960, as in the authors' code. The M modalities and the shared features, which are the concatenated
    orthonormal discrete cosine transforms (type II) of each modality's vectors, give M + 1 parts of width d: items
    W' leaky_relu(W x + b), 4d wide between, and users a parameter each. Rows of each part are unit vectors. The parts
    side by side, (U + I, (M + 1) d), are summed over the layers of the user-item graph; items then add S^n of
    themselves, S the weighted sum of the modalities' row-normalised k nearest neighbours, and the parts of a user are
    weighed by softmax(w f + (1 - w) theta): f is computed from each part by a small network, theta (U, M + 1) is a
    parameter. The loss is BPR + reg_weight (mean square of all users + mean square of all items).

    Progressive weight copying: in epoch t = 1, 2, .. the ratio w / (1 - w) is copy_start / (1 - copy_start) times
    copy_decay^(1 + 2 + .. + t), and from the second epoch on theta first takes the value of the softmax. The code copies
    that of the last training step before its update; here it is computed after the update.

    The paper defines the transform in two dimensions, over items and entries, which would depend on the order of the
    items; the code transforms each vector by itself, as here.
    """

    components = ("ranking", "penalty")

    shares: Tensor

    def __init__(
        self,
        interactions: sp.csr_matrix,
        features: Mapping[str, np.ndarray],
        item_graph: sp.csr_matrix,
        settings: LIRDRec,
    ) -> None:
        """Take (U, I) interactions, features by modality and S (I, I)."""
        super().__init__()
        self.settings = settings
        n_users, d = interactions.shape[0], settings.embedding_dim
        self.encoders = nn.ModuleList(Encoder(x, d) for x in (*features.values(), transformed(features)))
        n_parts = len(self.encoders)
        self.users = nn.ParameterList(nn.init.xavier_normal_(torch.empty(n_users, d)) for _ in range(n_parts))
        self.attention = nn.ModuleList(
            nn.Sequential(nn.Linear(d, max(1, d // 4)), nn.LeakyReLU(), nn.Linear(max(1, d // 4), 1))
            for _ in range(n_parts)
        )
        self.theta = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_users, n_parts)))
        # Epochs begun, and the seed of the last one modulo 2^24: a resumed epoch does not begin again. Both are
        # parameters without a gradient, because these are what checkpoints and model files store.
        self.progress = nn.Parameter(torch.zeros(2), requires_grad=False)
        # w and 1 - w of each epoch: a step takes them by index, without waiting for the device.
        shares = [computed_share(settings, epoch) for epoch in range(_EPOCHS)]
        self.register_buffer("shares", torch.tensor([[w, 1 - w] for w in shares]), persistent=False)
        self.adjacency = SparseMatrix(user_item_matrix(interactions))
        self.item_graph, self.transposed = SparseMatrix(item_graph), SparseMatrix(sp.csr_matrix(item_graph.T))

    @torch.no_grad()
    def begin_epoch(self, seed: int) -> None:
        """Copy the users' weights to theta, from the second epoch on, and shift the weight towards it."""
        begun, last = self.progress.tolist()
        if begun and last == seed % 2**24:
            return
        if begun:
            users, _ = self._propagated()
            self.theta.copy_(self._weights(users))
        self.progress.copy_(torch.tensor([begun + 1, seed % 2**24]))

    def training_embeddings(self, seed: int) -> Embeddings:
        """Return the embeddings; nothing is sampled."""
        users, items = self._propagated()
        weighted = self._weights(users)[:, :, None] * torch.stack(users, 1)
        return Embeddings(
            weighted.flatten(1),
            add_neighbours(self.item_graph, self.transposed, items, self.settings.n_mm_layers),
        )

    def _propagated(self) -> tuple[list[Tensor], Tensor]:
        """Return the parts of users, (U, d) each, and items (I, (M + 1) d)."""
        parts = [
            functional.normalize(torch.cat([users, encoder()]), dim=1)
            for users, encoder in zip(self.users, self.encoders, strict=True)
        ]
        nodes = propagate(self.adjacency, torch.cat(parts, 1), self.settings.n_ui_layers)
        n_users = len(self.theta)
        return list(nodes[:n_users].split(self.settings.embedding_dim, 1)), nodes[n_users:]

    def _weights(self, users: Sequence[Tensor]) -> Tensor:
        """Return the weights of each user's parts, (U, M + 1)."""
        computed = torch.cat([net(part) for net, part in zip(self.attention, users, strict=True)], 1)
        epoch = self.progress[:1].long().clamp(max=_EPOCHS - 1)
        w, rest = self.shares.index_select(0, epoch).unbind(1)
        return (w * computed + rest * self.theta).softmax(1)

    def loss(self, embeddings: Embeddings, batch: Batch) -> Loss:
        """Return BPR + reg_weight * penalty."""
        users = lookup(embeddings.users, batch.users)
        items, others = (lookup(embeddings.items, ids) for ids in (batch.items, batch.negatives))
        ranking = bpr_loss(users, items, others)
        size = embeddings.users.square().mean() + embeddings.items.square().mean()
        return Loss(ranking + self.settings.reg_weight * size, by_name(self.components, (ranking, size)))

    @torch.no_grad()
    def embed(self) -> Embeddings:
        """Return the embeddings."""
        return self.training_embeddings(0)


class Encoder(nn.Module):
    """Maps features (I, d_m) to (I, d) by two linear maps with a leaky ReLU between, 4d wide."""

    features: Tensor

    def __init__(self, features: np.ndarray, d: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.from_numpy(features), persistent=False)
        self.inner, self.outer = nn.Linear(features.shape[1], 4 * d), nn.Linear(4 * d, d, bias=False)

    def forward(self) -> Tensor:
        """Return the encoded features of all items."""
        encoded: Tensor = self.outer(functional.leaky_relu(self.inner(self.features)))
        return encoded


def transformed(features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the concatenated orthonormal DCTs (type II) of each modality's vectors, (I, sum of d_m) float32."""
    return np.concatenate([scipy.fft.dct(x, norm="ortho", axis=1) for x in features.values()], 1, dtype=np.float32)


def computed_share(settings: LIRDRec, epoch: int) -> float:
    """Return w of an epoch, from 1; 0 is the state before the first."""
    ratio = settings.copy_start / (1 - settings.copy_start) * math.pow(settings.copy_decay, epoch * (epoch + 1) / 2)
    return ratio / (1 + ratio)


def network(inputs: Inputs, settings: LIRDRec) -> DirectRepresentations:
    """Return the model; its initial values come from torch's global generator."""
    neighbours = [(items, others) for items, others, _ in inputs.neighbours.values()]
    weights = [inputs.weights[m] for m in inputs.neighbours]
    graph = item_item_matrix(neighbours, weights, inputs.interactions.shape[1])
    return DirectRepresentations(inputs.interactions, inputs.features, graph, settings)
