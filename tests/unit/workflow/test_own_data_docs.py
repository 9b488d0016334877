"""docs/your-own-data.md: its configuration is valid, and a missing folder of images is named with its key."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from checkout import SMALL
from repository import ROOT

from cm3.common.errors import UserError
from workflow.plan import data
from workflow.plan.config import load_config

PAGE = (ROOT / "docs/your-own-data.md").read_text(encoding="utf-8")


def test_the_documented_data_set_is_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = copy.deepcopy(SMALL)
    config["datasets"] |= yaml.safe_load(block)["datasets"]
    assert load_config(config).datasets["my-shop"].split_spec()["strategy"] == "user-time"


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
