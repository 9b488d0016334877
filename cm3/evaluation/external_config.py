"""Settings of an external model: recommendation lists that another tool has written, to be evaluated and compared."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from cm3.datasets.files.tables_config import TableFile
from cm3.model_spec import Estimate, ModelSpec, Sizes

__all__ = ["External"]

Name = str | None  # of a column


class External(ModelSpec):
    """Recommendation lists of another tool, read from a file: a row for each user and recommended item."""

    stage: ClassVar[str] = "external"
    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pyarrow")
    trains: ClassVar[bool] = False
    on_device: ClassVar[bool] = False
    exports: ClassVar[Literal["embeddings", "item_weights", "lists"]] = "lists"
    # The content of the file decides what runs again, not its path.
    runtime_fields: ClassVar[frozenset[str]] = frozenset({"recommendations"})

    name: Literal["external"] = "external"
    recommendations: str = Field(
        min_length=1,
        description="path of a csv, tsv, jsonl or Parquet file with a row for each recommendation: user, item, and rank or "
        "score; ids as in the dataset",
    )
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet"] = Field(
        "auto", description="format of the file; auto: by its suffix, after which .gz may follow"
    )
    user_column: Name = Field(None, min_length=1, description="column of user ids; null: user, user_id or userID")
    item_column: Name = Field(None, min_length=1, description="column of item ids; null: item, item_id or itemID")
    rank_column: Name = Field(
        None, min_length=1, description="column of ranks, lower is better; null: rank, if neither column is named"
    )
    score_column: Name = Field(
        None, min_length=1, description="column of scores, higher is better; null: score, if there is no rank"
    )

    @model_validator(mode="after")
    def _complete(self) -> "External":
        if self.rank_column is not None and self.score_column is not None:
            raise ValueError("rank_column and score_column: name one of them")
        try:
            _ = self.resolved_format
        except ValidationError as error:
            raise ValueError(str(error.errors()[0]["ctx"]["error"])) from None
        return self

    @property
    def resolved_format(self) -> str:
        """The format of the file; `auto` is resolved by the suffix."""
        return TableFile(path=self.recommendations, format=self.format).resolved_format

    def training_estimate(self, sizes: Sizes, *, epochs: int, batch_size: int) -> Estimate:
        """Return what reading the lists needs, as for an evaluation."""
        return self.evaluation_estimate(sizes)
