"""MMGCF: LightGCN, and one linear projection per modality that is fused into its items."""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.baselines.inputs import Inputs
from cm3.baselines.mmgcf import MMGCF
from cm3.baselines.networks.freedom import prune
from cm3.baselines.networks.layers import (
    layer_mean,
    projections,
    xavier_embedding,
)
from cm3.baselines.networks.lightgcn import LayeredEmbeddings, layered_loss
from cm3.model.graph import SparseMatrix, user_item_matrix
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch


class LateFusion(Network):
    """Multimodal Graph Collaborative Filtering for Recommendation with Graph Convolutional Networks, UMAP 2026.

    With e_u and e_i the means over LightGCN's layers, h_m = W_m x_m + b_m the projected features of modality m, and
    fuse the mean, the sum, or a linear map of the concatenation, users are e_u, and items are

        equal:       fuse(e_i, fuse(h_1, .., h_M))
        alpha:       fuse(a e_i, (1 - a) h_1, .., (1 - a) h_M), a = sigmoid of a parameter that starts at 0
        normalized:  fuse(M e_i / |e_i|, h_1 / |h_1|, .., h_M / |h_M|)

    The loss is BPR plus an L2 penalty on the batch's initial ID embeddings. Training uses a share 1 - dropout of the
    user-item edges, drawn for each epoch as in FREEDOM; scoring uses all of them. This is the authors' implementation in
    MMRec, which accepts an image and a text modality at most; its settings are grids, of which the defaults are points.
    """

    components = ("ranking", "penalty")

    def __init__(self, interactions: sp.csr_matrix, features: Mapping[str, np.ndarray], settings: MMGCF) -> None:
        """Take (U, I) interactions, and features by modality."""
        super().__init__()
        self.settings = settings
        d = settings.embedding_dim
        self.users, self.items = (xavier_embedding(n, d) for n in interactions.shape)
        self.modalities = projections(features, d, trained=False)
        if settings.weighting == "alpha":
            self.gate = nn.Parameter(torch.zeros(1))
        if settings.fusion == "concat":
            self.joint = nn.Linear((2 if settings.weighting == "equal" else len(features) + 1) * d, d)
            if settings.weighting == "equal" and len(features) > 1:
                self.modal = nn.Linear(len(features) * d, d)
        self.interactions = interactions
        self.adjacency = SparseMatrix(user_item_matrix(interactions))
        self.pruned = self.adjacency

    def begin_epoch(self, seed: int) -> None:
        """Prune the user-item graph by `seed`."""
        if self.settings.dropout:
            kept = prune(self.interactions, self.settings.dropout, seed)
            self.pruned = SparseMatrix(user_item_matrix(kept)).to(self.users.device)

    def training_embeddings(self, seed: int) -> LayeredEmbeddings:
        """Return a forward over the pruned graph."""
        return LayeredEmbeddings(*self._forward(self.pruned), self.users, self.items)

    def _forward(self, adjacency: SparseMatrix) -> tuple[Tensor, Tensor]:
        users, items = layer_mean(adjacency, self.users, self.items, self.settings.n_ui_layers)
        return users, self._fused(items, [modality() for modality in self.modalities])

    def _fused(self, items: Tensor, contents: list[Tensor]) -> Tensor:
        if self.settings.weighting == "alpha":
            a = self.gate.sigmoid()
            return self._joined([a * items, *((1 - a) * content for content in contents)])
        if self.settings.weighting == "normalized":
            units = [functional.normalize(content, dim=1) for content in contents]
            return self._joined([len(contents) * functional.normalize(items, dim=1), *units])
        if len(contents) == 1:
            return self._joined([items, contents[0]])
        if self.settings.fusion == "concat":
            return self._joined([items, self.modal(torch.cat(contents, 1))])
        return self._joined([items, self._joined(contents)])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        if self.settings.fusion == "concat":
            joined: Tensor = self.joint(torch.cat(list(parts), 1))
            return joined
        stacked = torch.stack(list(parts))
        return stacked.mean(0) if self.settings.fusion == "mean" else stacked.sum(0)

    def loss(self, embeddings: LayeredEmbeddings, batch: Batch) -> Loss:
        """Return BPR + reg_weight * penalty."""
        return layered_loss(embeddings, batch, self.settings.reg_weight, self.components)

    @torch.no_grad()
    def embed(self) -> Embeddings:
        """Return a forward over the whole graph."""
        return Embeddings(*self._forward(self.adjacency))


def network(inputs: Inputs, settings: MMGCF) -> LateFusion:
    """Return the model; its initial values come from torch's global generator."""
    return LateFusion(inputs.interactions, inputs.features, settings)
