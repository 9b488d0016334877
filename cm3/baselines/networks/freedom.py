"""FREEDOM: a frozen item-item graph, and a user-item graph pruned anew in each epoch."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.baselines.freedom import FREEDOM
from cm3.baselines.inputs import Inputs
from cm3.baselines.networks.layers import (
    SparseProduct,
    bpr_loss,
    by_name,
    layer_mean,
    lookup,
    projections,
    xavier_embedding,
)
from cm3.model.graph import SparseMatrix, item_item_matrix, user_item_matrix
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch


@dataclass(frozen=True)
class TwoGraphEmbeddings(Embeddings):
    """Embeddings of a training step: users (U, d), items (I, d), and the projected features of each modality, (I, d)."""

    contents: list[Tensor]


class FrozenAndPruned(Network):
    """Zhou and Shen, A Tale of Two Graphs: Freezing and Denoising Graph Structures, MM 2023.

    Users are the mean over LightGCN's layers, items the same plus S^n of their ID embeddings, S the weighted sum of the
    modalities' row-normalised k nearest neighbours. The loss is BPR + reg_weight sum_m BPR(users, projected features of
    modality m). Training uses a share 1 - dropout of the user-item edges, drawn without replacement with probability
    1 / sqrt(deg(u) deg(i)), anew for each epoch and normalised over the remaining edges; scoring uses all edges. All of this is
    as in the paper and in MMRec, where the features are trained, too (`train_features`).
    """

    components = ("ranking", "modalities")

    def __init__(
        self,
        interactions: sp.csr_matrix,
        features: Mapping[str, np.ndarray],
        item_graph: sp.csr_matrix,
        settings: FREEDOM,
    ) -> None:
        """Take (U, I) interactions, features by modality and S (I, I)."""
        super().__init__()
        self.settings = settings
        d = settings.embedding_dim
        self.users, self.items = (xavier_embedding(n, d) for n in interactions.shape)
        self.modalities = projections(features, d, settings.train_features)
        self.item_graph = SparseProduct(item_graph)
        self.interactions = interactions
        self.adjacency = SparseMatrix(user_item_matrix(interactions))
        self.pruned = self.adjacency

    def begin_epoch(self, seed: int) -> None:
        """Prune the user-item graph by `seed`."""
        if self.settings.dropout:
            kept = prune(self.interactions, self.settings.dropout, seed)
            self.pruned = SparseMatrix(user_item_matrix(kept)).to(self.users.device)

    def training_embeddings(self, seed: int) -> TwoGraphEmbeddings:
        """Return a forward over the pruned graph."""
        users, items = self._forward(self.pruned)
        return TwoGraphEmbeddings(users, items, [modality() for modality in self.modalities])

    def _forward(self, adjacency: SparseMatrix) -> tuple[Tensor, Tensor]:
        similar: Tensor = self.items
        for _ in range(self.settings.n_mm_layers):
            similar = self.item_graph(similar)
        users, items = layer_mean(adjacency, self.users, self.items, self.settings.n_ui_layers)
        return users, items + similar

    def loss(self, embeddings: TwoGraphEmbeddings, batch: Batch) -> Loss:
        """Return the weighted sum of the two parts."""
        users = lookup(embeddings.users, batch.users)
        ranking, *contents = (
            bpr_loss(users, lookup(table, batch.items), lookup(table, batch.negatives))
            for table in (embeddings.items, *embeddings.contents)
        )
        modalities = torch.stack(contents).sum()
        return Loss(ranking + self.settings.reg_weight * modalities, by_name(self.components, (ranking, modalities)))

    @torch.no_grad()
    def embed(self) -> Embeddings:
        """Return a forward over the whole graph."""
        return Embeddings(*self._forward(self.adjacency))


def prune(interactions: sp.csr_matrix, dropout: float, seed: int) -> sp.csr_matrix:
    """Return the (U, I) interactions without int(E dropout) or one more of their E: int(E (1 - dropout)) stay.

    They are drawn one after the other, each with probability proportional to 1 / sqrt(deg(u) deg(i)) among those left,
    which is what the smallest of exponential waiting times of these rates give (Efraimidis and Spirakis, Weighted
    random sampling with a reservoir, 2006).
    """
    edges = sp.coo_matrix(interactions)
    degrees = (np.bincount(ids, minlength=n) for ids, n in zip((edges.row, edges.col), edges.shape, strict=True))
    of_users, of_items = degrees
    rate = 1 / np.sqrt(of_users[edges.row].astype(np.float64) * of_items[edges.col])
    waiting = np.random.default_rng(seed).exponential(size=edges.nnz) / rate
    n_kept = int(edges.nnz * (1 - dropout))
    kept = np.sort(np.argpartition(waiting, n_kept)[:n_kept])
    return sp.csr_matrix((edges.data[kept], (edges.row[kept], edges.col[kept])), edges.shape)


def network(inputs: Inputs, settings: FREEDOM) -> FrozenAndPruned:
    """Return the model; its initial values come from torch's global generator."""
    neighbours = [(items, others) for items, others, _ in inputs.neighbours.values()]
    weights = [inputs.weights[m] for m in inputs.neighbours]
    graph = item_item_matrix(neighbours, weights, inputs.interactions.shape[1])
    return FrozenAndPruned(inputs.interactions, inputs.features, graph, settings)
