"""BM3: agreement of users, items and modalities with dropped-out copies of each other, without negative samples."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.baselines.bm3 import BM3
from cm3.baselines.inputs import Inputs
from cm3.baselines.networks.layers import by_name, layer_mean, lookup, projections, xavier_embedding
from cm3.model.graph import SparseMatrix, user_item_matrix
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch, seeded_generator


@dataclass(frozen=True)
class BootstrappedEmbeddings(Embeddings):
    """A training step's tensors; users (U, d), items (I, d) and contents, (I, d) each, are the predictor's outputs.

    The sources are the predictor's inputs, the targets are their copies outside the gradient with entries dropped.
    """

    contents: list[Tensor]
    source_users: Tensor
    source_items: Tensor
    target_users: Tensor
    target_items: Tensor
    target_contents: list[Tensor]


class Bootstrapped(Network):
    """Zhou et al., Bootstrap Latent Representations for Multi-modal Recommendation, WWW 2023.

    With h_u the mean over LightGCN's layers, h_i the same plus the item's ID embedding, h_m a linear map of modality m,
    a predictor P that all of them share, targets h' = dropout(h) outside the gradient, and C = 1 - cosine, the loss is

        C(P h_u, h'_i) + C(P h_i, h'_u) + cl_weight sum_m [C(P h_m, h'_i) + C(P h_m, h'_m)] + reg_weight (|U| + |I|) / n_I

    with |U| and |I| the Frobenius norms of all h_u and h_i and n_I the number of items. The paper penalises squares and
    has no cl_weight; both are as in the authors' code in MMRec, which the published settings belong to. Scores are
    (P h_u) (P h_i).
    """

    components = ("interactions", "modalities", "penalty")
    negative_sampling = "positive"

    def __init__(self, interactions: sp.csr_matrix, features: Mapping[str, np.ndarray], settings: BM3) -> None:
        super().__init__()
        self.settings = settings
        d = settings.embedding_dim
        self.users, self.items = (xavier_embedding(n, d) for n in interactions.shape)
        self.predictor = nn.Linear(d, d)
        self.modalities = projections(features, d, settings.train_features)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
        self.adjacency = SparseMatrix(user_item_matrix(interactions))

    def training_embeddings(self, seed: int) -> BootstrappedEmbeddings:
        """Return a forward whose dropout comes from `seed`."""
        users, items = self._sources()
        contents = [modality() for modality in self.modalities]
        generator = seeded_generator(users.device, seed)
        target_users, target_items, *targets = (self._target(h, generator) for h in (users, items, *contents))
        return BootstrappedEmbeddings(
            self.predictor(users),
            self.predictor(items),
            [self.predictor(h) for h in contents],
            users,
            items,
            target_users,
            target_items,
            targets,
        )

    def _sources(self) -> tuple[Tensor, Tensor]:
        users, items = layer_mean(self.adjacency, self.users, self.items, self.settings.n_layers)
        return users, items + self.items

    def _target(self, h: Tensor, generator: torch.Generator) -> Tensor:
        share = self.settings.dropout
        kept = torch.rand(h.shape, generator=generator, device=h.device) >= share
        return h.detach() * kept / (1 - share)

    def loss(self, embeddings: BootstrappedEmbeddings, batch: Batch) -> Loss:
        """Return the loss of a batch's pairs."""
        e = embeddings
        items = lookup(e.target_items, batch.items)
        pairs = _distance(lookup(e.users, batch.users), items)
        pairs = pairs + _distance(lookup(e.items, batch.items), lookup(e.target_users, batch.users))
        terms = []
        for content, target in zip(e.contents, e.target_contents, strict=True):
            online = lookup(content, batch.items)
            terms.append(_distance(online, items) + _distance(online, lookup(target, batch.items)))
        modalities = torch.stack(terms).sum()
        size = (e.source_users.norm() + e.source_items.norm()) / len(e.source_items)
        total = pairs + self.settings.cl_weight * modalities + self.settings.reg_weight * size
        return Loss(total, by_name(self.components, (pairs, modalities, size)))

    @torch.no_grad()
    def embed(self) -> Embeddings:
        """Return the predictor's outputs for users and items."""
        return Embeddings(*(self.predictor(h) for h in self._sources()))


def _distance(online: Tensor, target: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(online, target, dim=1).mean()


def network(inputs: Inputs, settings: BM3) -> Bootstrapped:
    """Return the model; its initial values come from torch's global generator."""
    return Bootstrapped(inputs.interactions, inputs.features, settings)
