"""DirectAU: alignment of users with their items, and uniformity of users and of items."""

import math

import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.baselines.directau import DirectAU
from cm3.baselines.inputs import Inputs
from cm3.baselines.networks.layers import by_name, layer_mean, lookup
from cm3.model.graph import SparseMatrix, user_item_matrix
from cm3.model.losses import alignment
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.pair_potential import tiled_uniformity
from cm3.model.sampling import Batch, CountedIds


class DirectlyAligned(Network):
    """alignment + gamma (uniformity(users) + uniformity(items)) / 2 over unit vectors; scored by the plain dot product.

    Wang et al., Towards Representation Alignment and Uniformity in Collaborative Filtering, KDD 2022, equations 6 to 8.
    The encoder is matrix factorisation, or LightGCN's with `n_layers` above 0. As in the authors' code, scores are of
    the vectors before they are normalised, initial values are N(0, 2 / (N + d)), and a batch's repeated users and items
    stay pairs at distance 0 unless `dedup_pairs` leaves them out. They train with `training.weight_decay` 1e-6.
    """

    components = ("alignment", "user_uniformity", "item_uniformity")
    negative_sampling = "positive"

    def __init__(self, interactions: sp.csr_matrix, settings: DirectAU) -> None:
        super().__init__()
        self.settings = settings
        d = settings.embedding_dim
        self.users, self.items = (nn.Parameter(torch.randn(n, d) * math.sqrt(2 / (n + d))) for n in interactions.shape)
        self.adjacency = SparseMatrix(user_item_matrix(interactions)) if settings.n_layers else None

    def training_embeddings(self, seed: int) -> Embeddings:
        """Return the embeddings; nothing is sampled."""
        if self.adjacency is None:
            return Embeddings(self.users, self.items)
        return Embeddings(*layer_mean(self.adjacency, self.users, self.items, self.settings.n_layers))

    def loss(self, embeddings: Embeddings, batch: Batch) -> Loss:
        """Return the weighted sum of the three parts."""
        align = alignment(_unit(embeddings.users, batch.users), _unit(embeddings.items, batch.items))
        users = _uniformity(embeddings.users, batch.counted_users)
        items = _uniformity(embeddings.items, batch.counted_negatives)
        return Loss(align + self.settings.gamma * (users + items) / 2, by_name(self.components, (align, users, items)))

    @torch.no_grad()
    def embed(self) -> Embeddings:
        """Return the embeddings."""
        embeddings = self.training_embeddings(0)
        return Embeddings(embeddings.users.detach(), embeddings.items.detach())


def _unit(table: Tensor, ids: Tensor) -> Tensor:
    return functional.normalize(lookup(table, ids), dim=1)


def _uniformity(table: Tensor, ids: CountedIds) -> Tensor:
    return tiled_uniformity(_unit(table, ids.ids), counts=ids.counts)


def network(inputs: Inputs, settings: DirectAU) -> DirectlyAligned:
    """Return the model; its initial values come from torch's global generator."""
    return DirectlyAligned(inputs.interactions, settings)
