"""VBPR: BPR on ID embeddings and projected features."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.baselines.inputs import Inputs
from cm3.baselines.networks.layers import bpr_loss, by_name, l2_penalty, lookup, xavier_embedding
from cm3.baselines.vbpr import VBPR
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch


class VisualRanking(Network):
    """Scores b_i + g_u g_i + t_u (E x_i) + c x_i for the concatenated features x of all modalities; BPR and an L2 penalty.

    He and McAuley, VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback, AAAI 2016, equation 4; the global
    and the user's bias move no ranking. MMRec leaves both item biases out and gives E an offset; here they are as in
    the paper. Concatenated modalities, and a penalty on whole item vectors, projections and biases included, are
    MMRec's: the paper's leaves E and c out (lambda_E = 0), and then grows through them as the rest is held small.
    """

    components = ("ranking", "penalty")
    features: Tensor

    def __init__(self, n_users: int, features: np.ndarray, settings: VBPR) -> None:
        super().__init__()
        self.settings = settings
        d = settings.embedding_dim
        self.register_buffer("features", torch.from_numpy(features), persistent=False)
        self.users = xavier_embedding(n_users, 2 * d)
        self.items = xavier_embedding(len(features), d)
        self.biases = nn.Parameter(torch.zeros(len(features), 1))
        # The rows of E, and c below them: the features are by far the widest factor, and are read once.
        bias = torch.zeros(1, features.shape[1])
        self.content = nn.Parameter(torch.cat([xavier_embedding(d, features.shape[1]).detach(), bias]))

    def training_embeddings(self, seed: int) -> Embeddings:
        """Return users [g_u | t_u | 1] and items [g_i | E x_i | b_i + c x_i], both 2d + 1 wide; nothing is sampled."""
        content = functional.linear(self.features, self.content)
        projected, bias = content[:, :-1], content[:, -1:] + self.biases
        users = torch.cat([self.users, self.users.new_ones(len(self.users), 1)], 1)
        return Embeddings(users, torch.cat([self.items, projected, bias], 1))

    def loss(self, embeddings: Embeddings, batch: Batch) -> Loss:
        """Return BPR + reg_weight * penalty."""
        users = lookup(embeddings.users, batch.users)
        items, others = (lookup(embeddings.items, ids) for ids in (batch.items, batch.negatives))
        ranking = bpr_loss(users, items, others)
        size = l2_penalty(lookup(self.users, batch.users), items, others)
        return Loss(ranking + self.settings.reg_weight * size, by_name(self.components, (ranking, size)))

    @torch.no_grad()
    def embed(self) -> Embeddings:
        """Return the embeddings."""
        return self.training_embeddings(0)


def network(inputs: Inputs, settings: VBPR) -> VisualRanking:
    """Return the model; its initial values come from torch's global generator."""
    parts = list(inputs.features.values())
    joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    return VisualRanking(inputs.interactions.shape[0], joined, settings)
