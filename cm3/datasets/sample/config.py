"""Config of the generated shop."""

from typing import Any, Literal

from pydantic import Field

from cm3.common.strict import Float
from cm3.datasets.base_config import Dataset
from cm3.datasets.images.config import ImageLimits


class Sample(Dataset):
    """A made-up shop of any size, whose customers' tastes are known."""

    source: Literal["sample"]
    users: int = Field(default=3000, ge=10, description="customers")
    items: int = Field(default=1000, ge=10, description="products")
    seed: int = Field(default=1, ge=0, description="another seed is another shop")
    interactions_per_user: Float = Field(default=10.5, ge=3, description="mean number of purchases of a customer")
    taste: Float = Field(default=1.0, ge=0, description="how much tastes decide; 0 is chance and popularity alone")
    picture_share: Float = Field(
        default=0.5, ge=0, le=1, description="share of taste that only images show; only texts tell the rest"
    )
    popularity: Float = Field(default=0.5, ge=0, description="how much popularity decides")
    cold: Float = Field(default=0.05, ge=0, lt=1, description="share of items that hardly anybody has bought yet")
    without_picture: Float = Field(default=0.03, ge=0, lt=1, description="share of items without image")
    without_description: Float = Field(default=0.1, ge=0, lt=1, description="share of items without description")
    corrupt_pictures: int = Field(default=5, ge=0, description="number of images that are damaged files")
    picture_size: int = Field(default=160, ge=32, le=1024, description="width and height of the images in pixels")
    images: ImageLimits = ImageLimits()

    def sample_spec(self) -> dict[str, Any]:
        """Return the spec of the sample stage, which writes the raw files of prepare_inputs and image_inputs."""
        shared = set(Dataset.model_fields) | {"images"}
        return self.model_dump(mode="json", exclude=shared)

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the generated raw files."""
        return {"reviews": f"raw/{name}/reviews.json.gz", "meta": f"raw/{name}/meta.json.gz"}

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {**super().prepare_spec(), "interactions": "reviews", "malformed": 0.0}

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage: the folder `images` beside the listing of image_inputs."""
        return {"find": "folder", "folder": None, "patterns": ["{item_id}.jpg"], **self.images.identity()}

    def image_inputs(self, name: str) -> dict[str, str]:
        """Return the checksums of the drawn images."""
        return {"images": f"raw/{name}/pictures.sha256"}
