"""BPR-MF: matrix factorisation with the BPR loss."""

import math

import torch
from torch import nn

from cm3.baselines.bpr_mf import BPRMF
from cm3.baselines.inputs import Inputs
from cm3.baselines.networks.layers import bpr_loss, by_name, l2_penalty, lookup
from cm3.model.network import Embeddings, Loss, Network
from cm3.model.sampling import Batch


class BPRMatrixFactorisation(Network):
    """Scores u i of ID embeddings; the loss is BPR plus an L2 penalty on the batch's rows.

    Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009. Initial values are
    N(0, 2 / (N + d)) as in RecBole and MMRec. The penalty is the paper's sum of squares; MMRec takes the norms of the
    three (B, d) tables, unsquared, over B.
    """

    components = ("ranking", "penalty")

    def __init__(self, n_users: int, n_items: int, settings: BPRMF) -> None:
        super().__init__()
        self.settings = settings
        d = settings.embedding_dim
        self.users = nn.Parameter(torch.randn(n_users, d) * math.sqrt(2 / (n_users + d)))
        self.items = nn.Parameter(torch.randn(n_items, d) * math.sqrt(2 / (n_items + d)))

    def training_embeddings(self, seed: int) -> Embeddings:
        """Return the parameters; nothing is sampled."""
        return Embeddings(self.users, self.items)

    def loss(self, embeddings: Embeddings, batch: Batch) -> Loss:
        """Return BPR + reg_weight * penalty."""
        users = lookup(embeddings.users, batch.users)
        items, others = (lookup(embeddings.items, ids) for ids in (batch.items, batch.negatives))
        ranking, size = bpr_loss(users, items, others), l2_penalty(users, items, others)
        return Loss(ranking + self.settings.reg_weight * size, by_name(self.components, (ranking, size)))

    def embed(self) -> Embeddings:
        """Return the parameters."""
        return Embeddings(self.users.detach(), self.items.detach())


def network(inputs: Inputs, settings: BPRMF) -> BPRMatrixFactorisation:
    """Return the model; its initial values come from torch's global generator."""
    n_users, n_items = inputs.interactions.shape
    return BPRMatrixFactorisation(n_users, n_items, settings)
