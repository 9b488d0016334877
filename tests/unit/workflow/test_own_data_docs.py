"""docs/your-own-data.md: its configuration is valid, and a missing folder of images is named with its key."""

import copy
import re
from pathlib import Path

import pytest
from checkout import SMALL
from repository import ROOT

from cm3.common.errors import UserError
from workflow.plan import data
from workflow.plan.config import load_config
from workflow.prune import read_config

PAGE = (ROOT / "docs/your-own-data.md").read_text(encoding="utf-8")


def test_the_documented_configuration_is_valid(tmp_path: Path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my-shop.yaml").write_text(block)
    files = [tmp_path / "my-shop.yaml"]
    config = load_config(read_config(files), files)
    assert config.datasets["my-shop"].split_spec()["strategy"] == "user-time"
    assert list(config.studies["my-shop-study"].points) == ["my-shop", "my-shop-noise", "my-shop-ease"]


def test_a_missing_folder_of_images_is_named_with_its_key(tmp_path: Path):
    config = copy.deepcopy(SMALL)
    images = {"folder": str(tmp_path / "photos"), "pattern": "{item_id}.jpg"}
    config["datasets"]["mine"] = {
        "source": "files",
        "interactions": {"path": "a.csv"},
        "items": {"path": "b.csv"},
        "images": images,
    }
    with pytest.raises(UserError, match=r"datasets\.mine\.images\.folder = '.*photos': no such folder"):
        data.image_inputs(load_config(config), "mine")
    (tmp_path / "photos").mkdir()
    data.image_inputs(load_config(config), "mine")
