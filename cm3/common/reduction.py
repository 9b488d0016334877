"""Settings of the reduction of features: how many numbers of each vector are kept, and by which method."""

from typing import Literal

from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.strict import Strict


class Reduction(Strict):
    """The reduction of feature vectors to fewer numbers."""

    method: Literal["pca"] = Field("pca", description="pca: projection onto the first principal axes of the vectors")
    dim: int = Field(gt=0, description="numbers of each reduced vector, fewer than the extractor gives")

    @property
    def suffix(self) -> str:
        """The reduction as in file names, such as pca512."""
        return f"{self.method}{self.dim}"

    def check(self, width: int, vectors: int, where: str) -> None:
        """Check that vectors can be reduced.

        Args:
            width: numbers of each vector.
            vectors: number of vectors.
            where: what has these vectors, for messages.

        Raises:
            UserError: the reduced vectors would not be shorter, or there are too few vectors for so many axes.
        """
        if self.dim >= width:
            raise UserError(
                f"{where}: has vectors of {width} numbers, which reduce.dim = {self.dim} does not make shorter; give a dim "
                f"below {width}, or remove reduce"
            )
        if self.dim >= vectors:
            raise UserError(
                f"{where}: has {vectors} vectors, too few for the {self.dim} axes of reduce.dim = {self.dim}; give a dim "
                f"below {vectors}, or remove reduce"
            )


def projection_file(features: str, reduction: str) -> str:
    """Return the path of the projection onto which the vectors of a features file are reduced.

    Args:
        features: path of the features that are reduced.
        reduction: `Reduction.suffix`.
    """
    return f"{features.removesuffix('.parquet')}-{reduction}.safetensors"
