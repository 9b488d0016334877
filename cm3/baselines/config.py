"""Settings of the baselines, by the name that a config gives them. Imports no torch."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.strict import Float, Strict, nearest, validate
from cm3.config import Neighbours, Weighted

__all__ = ["MODELS", "PATIENCE", "BaselineSettings", "baseline_settings"]

PATIENCE = 20
"""Validations without improvement after which a baseline stops, where the user says nothing, as in the MMRec toolbox.

Losses over pairs of items first undo what the graph's smoothing alone achieves, and then climb slowly: on the fashion
shop of benchmarks/RESULTS.md, LightGCN with a patience of 5 ends with its first epoch, and with CM3's 10 too early.
"""


class BaselineSettings(Strict):
    """What every baseline declares about itself.

    Attributes:
        module: where its code is; loaded by name.
        modalities: whether an experiment names extractors for it (required), or must name none.
        graphs: whether it reads the modalities' similarity files.
        trains: whether it is a network that the `training` settings fit; a closed form reads monitor and device alone.
        on_device: whether it computes on `training.device`; what does not asks for no GPU.
        exports: what is scored: user and item embeddings, or item weights W, the scores being history @ W.
    """

    module: ClassVar[str]
    modalities: ClassVar[Literal["none", "required"]] = "none"
    graphs: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    on_device: ClassVar[bool] = True
    exports: ClassVar[Literal["embeddings", "item_weights"]] = "embeddings"

    name: str


class _Content(BaselineSettings):
    """A model that reads features."""

    modalities: ClassVar[Literal["none", "required"]] = "required"

    missing: Literal["mean", "zero"] = Field(
        "mean", description="the vector that stands for a missing one: the mean of the others, or zero"
    )


class _Graphs(_Content, Neighbours):
    """A model that reads the items' neighbours in each modality."""

    graphs: ClassVar[bool] = True

    n_mm_layers: int = Field(1, ge=0, description="layers over the item-item graph")


class MostPop(BaselineSettings):
    """Every user gets the items with the most training interactions."""

    module: ClassVar[str] = "cm3.baselines.mostpop"
    trains: ClassVar[bool] = False
    on_device: ClassVar[bool] = False

    name: Literal["mostpop"] = "mostpop"


class ItemKNN(BaselineSettings):
    """An item's score is the summed cosine with those of its nearest items that the user has; by co-occurrence."""

    module: ClassVar[str] = "cm3.baselines.itemknn"
    trains: ClassVar[bool] = False
    on_device: ClassVar[bool] = False
    exports: ClassVar[Literal["embeddings", "item_weights"]] = "item_weights"

    name: Literal["itemknn"] = "itemknn"
    k: int = Field(100, gt=0, description="nearest items that can vote for an item, itself not among them")
    shrink: Float = Field(10.0, ge=0, description="added to the cosine's denominator: distrust of few common users")


class ItemKNNContent(BaselineSettings, Weighted):
    """The same with cosines of features, weighted over the modalities."""

    module: ClassVar[str] = "cm3.baselines.itemknn_content"
    modalities: ClassVar[Literal["none", "required"]] = "required"
    trains: ClassVar[bool] = False
    exports: ClassVar[Literal["embeddings", "item_weights"]] = "item_weights"

    name: Literal["itemknn-content"] = "itemknn-content"
    k: int = Field(10, gt=0, description="nearest items that can vote for an item, itself not among them")


class EASE(BaselineSettings):
    """The linear autoencoder without self-similarity, in closed form."""

    module: ClassVar[str] = "cm3.baselines.ease"
    trains: ClassVar[bool] = False
    exports: ClassVar[Literal["embeddings", "item_weights"]] = "item_weights"

    name: Literal["ease"] = "ease"
    l2: Float = Field(100.0, gt=0, description="lambda: penalty on the squared weights")
    max_items: int = Field(25_000, gt=0, description="more items than this are refused: memory grows with their square")


class BPRMF(BaselineSettings):
    """Matrix factorisation fitted by Bayesian personalised ranking."""

    module: ClassVar[str] = "cm3.baselines.bpr_mf"

    name: Literal["bpr-mf"] = "bpr-mf"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    reg_weight: Float = Field(0.01, ge=0, description="weight of the L2 penalty on a batch's embeddings")


class LightGCN(BaselineSettings):
    """Embeddings averaged over layers of the user-item graph."""

    module: ClassVar[str] = "cm3.baselines.lightgcn"

    name: Literal["lightgcn"] = "lightgcn"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_layers: int = Field(3, ge=0, description="layers over the user-item graph")
    reg_weight: Float = Field(1e-4, ge=0, description="weight of the L2 penalty on a batch's initial embeddings")


class DirectAU(BaselineSettings):
    """Alignment and uniformity of user and item embeddings as the loss."""

    module: ClassVar[str] = "cm3.baselines.directau"

    name: Literal["directau"] = "directau"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_layers: int = Field(0, ge=0, description="layers over the user-item graph; 0: matrix factorisation")
    gamma: Float = Field(1.0, ge=0, description="weight of the uniformity losses")
    dedup_pairs: bool = Field(False, description="leave pairs of the same user or item out of the uniformity losses")


class VBPR(_Content):
    """BPR whose items also have a projection of their features."""

    module: ClassVar[str] = "cm3.baselines.vbpr"

    name: Literal["vbpr"] = "vbpr"
    embedding_dim: int = Field(64, gt=0, description="width d of the free embeddings, and of the projected features")
    reg_weight: Float = Field(
        0.01, ge=0, description="weight of the L2 penalty on a batch's whole user and item vectors"
    )


class BM3(_Content):
    """Bootstrapped agreement of users, items and modalities, without negative samples."""

    module: ClassVar[str] = "cm3.baselines.bm3"

    name: Literal["bm3"] = "bm3"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_layers: int = Field(1, ge=0, description="layers over the user-item graph")
    dropout: Float = Field(0.5, ge=0, lt=1, description="share of the target embeddings' entries that are dropped")
    cl_weight: Float = Field(2.0, ge=0, description="weight of the losses between and within modalities")
    reg_weight: Float = Field(0.1, ge=0, description="weight of the penalty on the norms of all embeddings")
    train_features: bool = Field(False, description="whether the features are parameters, too, as in the MMRec toolbox")


class FREEDOM(_Graphs, Weighted):
    """A frozen item-item graph and a user-item graph whose edges are pruned anew in each epoch."""

    module: ClassVar[str] = "cm3.baselines.freedom"

    name: Literal["freedom"] = "freedom"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_ui_layers: int = Field(2, ge=0, description="layers over the user-item graph")
    dropout: Float = Field(0.8, ge=0, lt=1, description="share of the user-item edges that an epoch leaves out")
    reg_weight: Float = Field(1e-3, ge=0, description="weight of the modalities' own ranking losses")
    train_features: bool = Field(False, description="whether the features are parameters, too, as in the MMRec toolbox")


class MGCN(_Graphs):
    """Features purified by behaviour, views of users and items, and their fusion by attention."""

    module: ClassVar[str] = "cm3.baselines.mgcn"

    name: Literal["mgcn"] = "mgcn"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_ui_layers: int = Field(2, ge=0, description="layers over the user-item graph")
    cl_weight: Float = Field(0.01, ge=0, description="weight of the contrastive loss between behaviour and content")
    temperature: Float = Field(0.2, gt=0, description="of the contrastive loss")
    reg_weight: Float = Field(1e-4, ge=0, description="weight of the L2 penalty on a batch's embeddings")
    train_features: bool = Field(False, description="whether the features are parameters, too, as in the MMRec toolbox")


_CLASSES = (MostPop, ItemKNN, ItemKNNContent, EASE, BPRMF, LightGCN, DirectAU, VBPR, BM3, FREEDOM, MGCN)

MODELS: dict[str, type[BaselineSettings]] = {str(cls.model_fields["name"].default): cls for cls in _CLASSES}
"""Settings by the name that a config gives a model."""


def baseline_settings(data: Mapping[str, Any], where: str = "model") -> BaselineSettings:
    """Return the validated settings of the model that `data["name"]` names; `where` is the key path for complaints.

    Raises:
        UserError: no or an unknown name, an unknown key, a wrong type, an impossible value.
    """
    name = data.get("name")
    if name not in MODELS:
        raise UserError(f"{where}.name = {name!r}: no such baseline{nearest(str(name), MODELS)}")
    return validate(MODELS[name], dict(data), where)
