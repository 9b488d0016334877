"""MGCN: features purified by behaviour, one view of users and items per modality, and fusion by attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.baselines.inputs import Inputs
from cm3.baselines.mgcn import MGCN
from cm3.baselines.networks.layers import (
    SparseProduct,
    bpr_loss,
    by_name,
    l2_penalty,
    layer_mean,
    lookup,
    projections,
    xavier_embedding,
)
from cm3.baselines.smore import SMORE
from cm3.model.graph import SparseMatrix, user_item_matrix
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch


@dataclass(frozen=True)
class MultiViewEmbeddings(Embeddings):
    """Users (U, d), items (I, d), and the two summands of both, (U + I, d): behaviour and content."""

    behaviour: Tensor
    content: Tensor


class MultiViewNetwork(Network):
    """Yu et al., Multi-View Graph Convolutional Network for Multimedia Recommendation, MM 2023.

    Behaviour view: the mean over LightGCN's layers. Content view of modality m, with item ID embeddings e and
    projected features h_m: items c_m = S_m^n (e * sigmoid(G_m h_m)), users R c_m, with S_m the symmetric-normalised
    cosines of the k nearest neighbours and R the user rows of the normalised user-item graph. Shared content
    s = sum_m softmax_m(q tanh(Q c_m)) c_m; content = (s + sum_m sigmoid(P_m behaviour) * (c_m - s)) / (M + 1), and
    users and items are behaviour + content. The loss is BPR, an L2 penalty on the batch's users and items, and the
    InfoNCE of behaviour and content for the batch's users and items.

    As in the authors' code in MMRec: the division by M + 1, where the paper adds the mean over m to s, and the penalty
    on final rather than initial embeddings. There, the features are trained, too (`train_features`), and the step size
    shrinks by 0.96 each 50 epochs, which is training.schedule: exponential with lr_decay: 0.99918.
    """

    components = ("ranking", "penalty", "contrast")

    def __init__(
        self,
        interactions: sp.csr_matrix,
        features: Mapping[str, np.ndarray],
        item_graphs: Sequence[sp.csr_matrix],
        settings: MGCN,
    ) -> None:
        """Take (U, I) interactions, and features and S_m (I, I) by modality."""
        super().__init__()
        self.settings = settings
        d = settings.embedding_dim
        self.users, self.items = (xavier_embedding(n, d) for n in interactions.shape)
        self.modalities = projections(features, d, settings.train_features)
        self.attention = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 1, bias=False))
        self.purifiers, self.preferences = (nn.ModuleList(nn.Linear(d, d) for _ in features) for _ in range(2))
        self.item_graphs = nn.ModuleList(SparseProduct(graph) for graph in item_graphs)
        adjacency = user_item_matrix(interactions)
        n_users = len(self.users)
        self.adjacency = SparseMatrix(adjacency)
        self.user_rows = SparseProduct(sp.csr_matrix(adjacency[:n_users, n_users:]))

    def forward(self) -> MultiViewEmbeddings:
        """Embed every user and item."""
        behaviour = torch.cat(layer_mean(self.adjacency, self.users, self.items, self.settings.n_ui_layers))
        views = torch.stack([self._view(m) for m in range(len(self.modalities))])
        shared = (self.attention(views).softmax(0) * views).sum(0)
        own = [
            preference(behaviour).sigmoid() * (view - shared)
            for preference, view in zip(self.preferences, views, strict=True)
        ]
        content = (shared + torch.stack(own).sum(0)) / (len(views) + 1)
        users, items = (behaviour + content).split([len(self.users), len(self.items)])
        return MultiViewEmbeddings(users, items, behaviour, content)

    def _view(self, m: int) -> Tensor:
        items = self.items * self.purifiers[m](self.modalities[m]()).sigmoid()
        for _ in range(self.settings.n_mm_layers):
            items = self.item_graphs[m](items)
        return torch.cat([self.user_rows(items), items])

    def training_embeddings(self, seed: int) -> MultiViewEmbeddings:
        """Return the embeddings; nothing is sampled."""
        embeddings: MultiViewEmbeddings = self()
        return embeddings

    def loss(self, embeddings: MultiViewEmbeddings, batch: Batch) -> Loss:
        """Return BPR + reg_weight * penalty + cl_weight * contrast."""
        return multi_view_loss(embeddings, batch, self.settings, self.components)

    @torch.no_grad()
    def embed(self) -> MultiViewEmbeddings:
        """Return the embeddings."""
        return self.training_embeddings(0)


def multi_view_loss(
    embeddings: MultiViewEmbeddings, batch: Batch, settings: MGCN | SMORE, components: Sequence[str]
) -> Loss:
    """Return BPR + reg_weight * L2 penalty + cl_weight * InfoNCE of content and behaviour, of a batch's users and items."""
    users = lookup(embeddings.users, batch.users)
    items, others = (lookup(embeddings.items, ids) for ids in (batch.items, batch.negatives))
    ranking, size = bpr_loss(users, items, others), l2_penalty(users, items, others)
    nodes = (batch.users, batch.items + len(embeddings.users))
    temperature = settings.temperature
    contrast = torch.stack(
        [info_nce(lookup(embeddings.content, ids), lookup(embeddings.behaviour, ids), temperature) for ids in nodes]
    ).sum()
    total = ranking + settings.reg_weight * size + settings.cl_weight * contrast
    return Loss(total, by_name(components, (ranking, size, contrast)))


def info_nce(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return -mean_a log(exp(cos(x_a, y_a) / t) / sum_b exp(cos(x_a, y_b) / t)) of (B, d) and (B, d)."""
    cosines = functional.normalize(x, dim=1) @ functional.normalize(y, dim=1).T / temperature
    return (cosines.logsumexp(1) - cosines.diagonal()).mean()


def similarity_matrix(neighbours: tuple[np.ndarray, np.ndarray, np.ndarray], n_items: int) -> sp.csr_matrix:
    """Return D^-1/2 C D^-1/2 (I, I), C the cosines of each item's neighbours, D its row sums; cosines below 0 are left out."""
    items, others, cosines = neighbours
    graph = sp.csr_matrix((np.maximum(cosines, 0).astype(np.float64), (items, others)), (n_items, n_items))
    graph.eliminate_zeros()
    degree = np.asarray(graph.sum(1)).ravel()
    scale = sp.diags_array(np.divide(1, np.sqrt(degree), out=np.zeros(n_items), where=degree > 0))
    return sp.csr_matrix(scale @ graph @ scale)


def network(inputs: Inputs, settings: MGCN) -> MultiViewNetwork:
    """Return the model; its initial values come from torch's global generator."""
    n_items = inputs.interactions.shape[1]
    graphs = [similarity_matrix(neighbours, n_items) for neighbours in inputs.neighbours.values()]
    return MultiViewNetwork(inputs.interactions, inputs.features, graphs, settings)
