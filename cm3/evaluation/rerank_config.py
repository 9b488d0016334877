"""Settings of re-ranking: a model that orders the first items of an experiment's lists by the scores of others as well."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cm3.common.strict import Float
from cm3.model_spec import Estimate, ModelSpec, Sizes

Weight = Annotated[Float, Field(ge=0)]


class Rerank(ModelSpec):
    """The first items of an experiment's lists, ordered by its own and other experiments' standardised scores."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "scipy", "torch")
    stage: ClassVar[str] = "rerank"
    trains: ClassVar[bool] = False
    on_device: ClassVar[bool] = False
    exports: ClassVar[Literal["embeddings", "item_weights", "lists"]] = "lists"

    name: Literal["rerank"] = "rerank"
    of: str = Field(description="experiment whose lists are ordered anew; its run is used and not trained again")
    by: list[str] = Field(
        min_length=1, description="experiments on the same dataset whose scores count as well, such as one of `ease`"
    )
    top: int = Field(
        200,
        gt=0,
        description="how many of a user's first items are ordered anew; a number above that of the items: all",
    )
    weights: dict[str, Weight] = Field(
        default_factory=dict,
        description="weight of the standardised score of an experiment of `by`, relative to 1 of `of`; those without one are "
        "chosen from `grid` by training.monitor on the validation split",
    )
    grid: list[Weight] = Field(
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2],
        min_length=1,
        description="weights to try; all combinations for the experiments of `by`",
    )

    @model_validator(mode="after")
    def _known_and_distinct(self) -> "Rerank":
        for name in self.by:
            if self.by.count(name) > 1 or name == self.of:
                raise ValueError(f"by: {name!r} is given twice")
        for name in self.weights:
            if name not in self.by:
                raise ValueError(f"weights.{name}: not one of by")
        return self

    def training_estimate(self, sizes: Sizes, *, epochs: int, batch_size: int) -> Estimate:
        """Return what the choice of weights needs: as an evaluation, and the candidates of all users and models."""
        candidates = sizes.users * self.top * (len(self.by) + 2) * 8 / 1e6
        found = self.evaluation_estimate(sizes)
        return Estimate(found.memory_mb + candidates, 2 * found.minutes)

    def evaluation_estimate(self, sizes: Sizes) -> Estimate:
        """Return what evaluation needs: the files of all models, and their scores of a block of users."""
        models = len(self.by) + 1
        exported = models * (sizes.exported_mb or (sizes.users + sizes.items) * 256 * 4 / 1e6)
        rows = sizes.interactions * 100 + sizes.users * 6000
        return Estimate(2000 + 4 * exported + rows / 1e6, 15 + models * sizes.users * sizes.items / 1e9)
