"""LightGCN: embeddings averaged over the layers of the user-item graph."""

from collections.abc import Sequence
from dataclasses import dataclass

import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.baselines.inputs import Inputs
from cm3.baselines.lightgcn import LightGCN
from cm3.baselines.networks.layers import bpr_loss, by_name, l2_penalty, layer_mean, lookup, xavier_embedding
from cm3.model.graph import SparseMatrix, user_item_matrix
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch


@dataclass(frozen=True)
class LayeredEmbeddings(Embeddings):
    """Averages over the layers, users (U, d) and items (I, d), and the initial embeddings of both."""

    ego_users: Tensor
    ego_items: Tensor


def layered_loss(embeddings: LayeredEmbeddings, batch: Batch, reg_weight: float, components: Sequence[str]) -> Loss:
    """Return BPR of the averages + reg_weight * L2 penalty on the initial embeddings of the batch."""
    users = lookup(embeddings.users, batch.users)
    items, others = (lookup(embeddings.items, ids) for ids in (batch.items, batch.negatives))
    ranking = bpr_loss(users, items, others)
    ego_items = (lookup(embeddings.ego_items, ids) for ids in (batch.items, batch.negatives))
    size = l2_penalty(lookup(embeddings.ego_users, batch.users), *ego_items)
    return Loss(ranking + reg_weight * size, by_name(components, (ranking, size)))


class LightGraphNetwork(Network):
    """e = 1/(L + 1) sum_{l=0..L} A^l e_0 with the symmetric-normalised A; BPR plus an L2 penalty on the batch's e_0.

    He et al., LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation, SIGIR 2020, equations 3,
    4 and 15, with alpha_l = 1/(L + 1). The penalty is half the squares over B as in the authors' code; RecBole takes
    unsquared norms by default.
    """

    components = ("ranking", "penalty")

    def __init__(self, interactions: sp.csr_matrix, settings: LightGCN) -> None:
        super().__init__()
        self.settings = settings
        self.users, self.items = (xavier_embedding(n, settings.embedding_dim) for n in interactions.shape)
        self.adjacency = SparseMatrix(user_item_matrix(interactions))

    def training_embeddings(self, seed: int) -> LayeredEmbeddings:
        """Return the embeddings; nothing is sampled."""
        users, items = layer_mean(self.adjacency, self.users, self.items, self.settings.n_layers)
        return LayeredEmbeddings(users, items, self.users, self.items)

    def loss(self, embeddings: LayeredEmbeddings, batch: Batch) -> Loss:
        """Return BPR + reg_weight * penalty."""
        return layered_loss(embeddings, batch, self.settings.reg_weight, self.components)

    @torch.no_grad()
    def embed(self) -> LayeredEmbeddings:
        """Return the embeddings."""
        return self.training_embeddings(0)


def network(inputs: Inputs, settings: LightGCN) -> LightGraphNetwork:
    """Return the model; its initial values come from torch's global generator."""
    return LightGraphNetwork(inputs.interactions, settings)
