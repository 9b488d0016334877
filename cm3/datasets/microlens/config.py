"""Settings of MicroLens: short videos with titles and covers, in two published sizes."""

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from cm3.common.http import without_secrets
from cm3.datasets.published import PublishedSource, Url

_FEATURES = {
    "text": "title_en_text_features_BgeM3.npy",
    "image": "image_features_CLIPRN50.npy",
    "video": "video_features_VideoMAE.npy",
}


class MicroLensSpec(PublishedSource):
    """MicroLens-50k or MicroLens-100k."""

    version = 1
    reader = "cm3.datasets.microlens.reader:Reader"

    source: Literal["microlens"]
    size: Literal["50k", "100k"] = Field(default="50k", description="Number of users: 50k or 100k.")
    interactions: Literal["csv", "tsv"] = Field(
        default="csv",
        description="csv: user, item and time; tsv: the same interactions without times, one user per line.",
    )
    mirrors: list[Url] = Field(
        default=["https://recsys.westlake.edu.cn"],
        description="Base URLs of the published files, tried in order; they contain MicroLens-50k-Dataset/.",
    )
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="keep", description="As for every dataset. Default keep: a video without a title still has a cover."
    )

    @property
    def _tree(self) -> str:
        return f"MicroLens-{self.size}-Dataset"

    def files(self) -> dict[str, str]:
        """Return the published files; only 100k has categories and features."""
        stem = f"{self._tree}/MicroLens-{self.size}"
        files = {"csv": f"{stem}_pairs.csv", "tsv": f"{stem}_pairs.tsv"}
        if self.size == "50k":
            return {**files, "titles": f"{stem}_titles.csv"}
        features = f"{self._tree}/extracted_modality_features/MicroLens-100k"
        return {
            **files,
            "titles": f"{stem}_title_en.csv",
            "categories": f"{self._tree}/tags_to_summary.csv",
            **{f"features.{modality}": f"{features}_{file}" for modality, file in _FEATURES.items()},
        }

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return interactions, titles and, for 100k, categories; these are optional in a local folder."""
        inputs = {kind: self.place(name, kind) for kind in (self.interactions, "titles")}
        if self.size == "100k" and (self.folder is None or Path(self.place(name, "categories")).is_file()):
            inputs["categories"] = self.place(name, "categories")
        return inputs

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage, with the base URLs of the covers, one per mirror."""
        # These addresses become part of the item table, so they hold no secret of a mirror.
        roots = [without_secrets(root).rstrip("/") for root in self.mirrors]
        covers = [f"{root}/{self._tree}/MicroLens-{self.size}_covers" for root in roots]
        return {**super().prepare_spec(), "interactions": self.interactions, "covers": covers}

    def image_hosts(self) -> list[str]:
        """Return the hosts of the mirrors, which also serve the covers."""
        return sorted({urlsplit(root).hostname or "" for root in self.mirrors})

    def published_vectors(self, name: str, modality: str) -> dict[str, str]:
        """Return the features of 100k: text, image or video, rows in the order of ids (format microlens)."""
        kind = f"features.{modality}"
        return {"vectors": self.place(name, kind)} if kind in self.files() else {}
