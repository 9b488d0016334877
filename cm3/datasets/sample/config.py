"""Settings of the generated sample dataset."""

from typing import Any, Literal

from pydantic import Field

from cm3.common.strict import Float
from cm3.datasets.images.config import ImageLimits
from cm3.datasets.spec import SourceSpec


class SampleSpec(SourceSpec):
    """A generated shop of any size with known user preferences."""

    version = 1
    libraries = ("orjson",)
    reader = "cm3.datasets.amazon.v2014:Reader"

    source: Literal["sample"]
    users: int = Field(default=3000, ge=10, description="Number of users.")
    items: int = Field(default=1000, ge=10, description="Number of items.")
    seed: int = Field(default=1, ge=0, description="Seed of the generator.")
    interactions_per_user: Float = Field(default=10.5, ge=3, description="Mean number of interactions of a user.")
    taste: Float = Field(default=1.0, ge=0, description="Weight of user preferences; 0: popularity and chance only.")
    picture_share: Float = Field(
        default=0.5, ge=0, le=1, description="Fraction of the preferences that only images show; texts show the rest."
    )
    popularity: Float = Field(default=0.5, ge=0, description="Weight of item popularity.")
    cold: Float = Field(default=0.05, ge=0, lt=1, description="Fraction of items with almost no interactions.")
    without_picture: Float = Field(default=0.03, ge=0, lt=1, description="Fraction of items without image.")
    without_description: Float = Field(default=0.1, ge=0, lt=1, description="Fraction of items without description.")
    corrupt_pictures: int = Field(default=5, ge=0, description="Number of damaged image files.")
    picture_size: int = Field(default=160, ge=32, le=1024, description="Width and height of the images in pixels.")
    images: ImageLimits = ImageLimits()

    def generate_spec(self) -> dict[str, Any]:
        """Return the spec of the generate stage, which writes the raw files of prepare_inputs and image_inputs."""
        shared = set(SourceSpec.model_fields) | {"images"}
        return self.model_dump(mode="json", exclude=shared)

    def expected_counts(self) -> dict[str, int]:
        """Return the numbers of users and items that are generated, unless `expected` states others."""
        return {"users": self.users, "items": self.items, **super().expected_counts()}

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the generated raw files."""
        return {"reviews": f"raw/{name}/reviews.json.gz", "meta": f"raw/{name}/meta.json.gz"}

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {**super().prepare_spec(), "interactions": "reviews", "malformed": 0.0}

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage: the folder `images` next to the checksum file of image_inputs."""
        return {"find": "folder", "folder": None, "patterns": ["{item_id}.jpg"], **self.images.identity()}

    def image_inputs(self, name: str) -> dict[str, str]:
        """Return the file with the checksums of the generated images."""
        return {"images": f"raw/{name}/pictures.sha256"}
