"""SMORE: features filtered and fused in the frequency domain, one view per modality and one of their fusion."""

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from cm3.baselines.inputs import Inputs
from cm3.baselines.networks.layers import SparseProduct, layer_mean, projections, xavier_embedding
from cm3.baselines.networks.mgcn import MultiViewEmbeddings, multi_view_loss, similarity_matrix
from cm3.baselines.smore import SMORE
from cm3.model.graph import SparseMatrix, user_item_matrix
from cm3.model.network import Loss, Network
from cm3.model.sampling import Batch, seeded_generator


class SpectrumNetwork(Network):
    """Ong and Khong, Spectrum-based Modality Representation Fusion Graph Convolutional Network, WSDM 2025.

    With h_m = W_m x_m + b_m the projected features, F the orthonormal real Fourier transform along their d entries, and
    complex filters q: c_m = F^-1(q_m F h_m), and the fused c_f = F^-1(q_f prod_m F h_m). With item ID embeddings e, the
    view v of m or f is S^n (e * sigmoid(G c)) for items and R of it for users: S_m holds the symmetric-normalised
    cosines of the k nearest neighbours, S_f the larger entry of all S_m, and R the user rows of the normalised
    user-item graph. Behaviour b is the mean over LightGCN's layers; with attention a_m = softmax_d(Q_m v_f),

        content = (sum_m sigmoid(P_m b) * a_m * v_m + sigmoid(P_f b) * v_f) / (M + 1)

    Users and items are b + content; entries of the sigmoids are dropped in training. The loss is that of MGCN.

    As in the authors' code in MMRec, with two generalisations: any number of modalities, and one `knn_k` for all. There,
    the features are trained, too (`train_features`), and the step size shrinks by 0.96 each 50 epochs, which is
    training.schedule: exponential with lr_decay: 0.99918.
    """

    components = ("ranking", "penalty", "contrast")

    def __init__(
        self,
        interactions: sp.csr_matrix,
        features: Mapping[str, np.ndarray],
        item_graphs: Sequence[sp.csr_matrix],
        settings: SMORE,
    ) -> None:
        """Take (U, I) interactions, and features and S_m (I, I) by modality."""
        super().__init__()
        self.settings = settings
        d, n_views = settings.embedding_dim, len(features) + 1
        self.users, self.items = (xavier_embedding(n, d) for n in interactions.shape)
        self.modalities = projections(features, d, settings.train_features)
        self.filters = nn.Parameter(torch.randn(n_views, d // 2 + 1, 2))
        self.purifiers, self.preferences = (nn.ModuleList(nn.Linear(d, d) for _ in range(n_views)) for _ in range(2))
        self.attention = nn.ModuleList(
            nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d, bias=False)) for _ in features
        )
        fused = reduce(lambda x, y: x.maximum(y), item_graphs)
        self.item_graphs = nn.ModuleList(SparseProduct(graph) for graph in (*item_graphs, fused))
        adjacency = user_item_matrix(interactions)
        n_users = len(self.users)
        self.adjacency = SparseMatrix(adjacency)
        self.user_rows = SparseProduct(sp.csr_matrix(adjacency[:n_users, n_users:]))

    def training_embeddings(self, seed: int) -> MultiViewEmbeddings:
        """Return a forward whose dropout comes from `seed`."""
        return self._forward(seeded_generator(self.users.device, seed))

    def _forward(self, generator: torch.Generator | None = None) -> MultiViewEmbeddings:
        behaviour = torch.cat(layer_mean(self.adjacency, self.users, self.items, self.settings.n_ui_layers))
        *views, fused = (self._view(at, x) for at, x in enumerate(self._filtered()))
        parts = [net(fused).softmax(1) * view for net, view in zip(self.attention, views, strict=True)]
        gated = [
            self._dropped(preference(behaviour).sigmoid(), generator) * part
            for preference, part in zip(self.preferences, (*parts, fused), strict=True)
        ]
        content = torch.stack(gated).mean(0)
        users, items = (behaviour + content).split([len(self.users), len(self.items)])
        return MultiViewEmbeddings(users, items, behaviour, content)

    def _filtered(self) -> list[Tensor]:
        """Return the filtered features of each modality and of their fusion, (I, d) each."""
        spectra = [torch.fft.rfft(modality(), dim=1, norm="ortho") for modality in self.modalities]
        spectra.append(torch.stack(spectra).prod(0))
        filters = torch.view_as_complex(self.filters)
        d = self.settings.embedding_dim
        return [torch.fft.irfft(x * q, n=d, dim=1, norm="ortho") for x, q in zip(spectra, filters, strict=True)]

    def _view(self, at: int, filtered: Tensor) -> Tensor:
        items = self.items * self.purifiers[at](filtered).sigmoid()
        for _ in range(self.settings.n_mm_layers):
            items = self.item_graphs[at](items)
        return torch.cat([self.user_rows(items), items])

    def _dropped(self, gate: Tensor, generator: torch.Generator | None) -> Tensor:
        share = self.settings.dropout
        if generator is None or not share:
            return gate
        kept = torch.rand(gate.shape, generator=generator, device=gate.device) >= share
        return gate * kept / (1 - share)

    def loss(self, embeddings: MultiViewEmbeddings, batch: Batch) -> Loss:
        """Return BPR + reg_weight * penalty + cl_weight * contrast."""
        return multi_view_loss(embeddings, batch, self.settings, self.components)

    @torch.no_grad()
    def embed(self) -> MultiViewEmbeddings:
        """Return a forward without dropout."""
        return self._forward()


def network(inputs: Inputs, settings: SMORE) -> SpectrumNetwork:
    """Return the model; its initial values come from torch's global generator."""
    n_items = inputs.interactions.shape[1]
    graphs = [similarity_matrix(neighbours, n_items) for neighbours in inputs.neighbours.values()]
    return SpectrumNetwork(inputs.interactions, inputs.features, graphs, settings)
