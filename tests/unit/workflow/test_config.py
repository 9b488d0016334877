"""A wrong configuration is refused before any job starts: key path, value, nearest valid name."""

import copy
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import SMALL, Checkout
from repository import ROOT

from cm3.common.errors import UserError
from cm3.config import WARM
from workflow import reference
from workflow.plan import data, runs
from workflow.plan.config import Config, load_config
from workflow.plan.publish import command


def shipped() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "config/config.yaml").read_text())


def with_value(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(SMALL)
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return config


def test_the_shipped_config_has_the_promised_experiments():
    config = load_config(shipped())
    assert {"sample", "baby", "sports", "clothing", "electronics", "baby-paper"} <= config.experiments.keys()
    for name in ("baby", "sports", "clothing", "electronics"):
        assert list(config.experiments[name].modalities) == ["text", "image", "caption"]
    assert config.extractors[config.experiments["baby-paper"].modalities["image"]].backend == "precomputed"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("experimants", {}, r"experimants: unknown key \(did you mean 'experiments'\?\)"),
        ("datasets.shop.user", 3, r"datasets\.shop\.user: unknown key \(did you mean 'users'\?\)"),
        ("datasets.shop.source", "sampel", r"datasets\.shop\.source = 'sampel'.*did you mean 'sample'"),
        ("datasets.shop.users", "many", r"datasets\.shop\.users = 'many': Input should be a valid integer"),
        ("datasets.shop.users", 1.5, r"datasets\.shop\.users = 1\.5"),
        ("datasets.shop.kcore", -1, r"datasets\.shop\.kcore = -1: Input should be greater than or equal to 0"),
        ("datasets.shop.split.strategy", "rnd", r"datasets\.shop\.split\.strategy = 'rnd'"),
        ("extractors.looks.backend", "descriptr", r"extractors\.looks\.backend.*'descriptr'.*'descriptor'"),
        ("extractors.looks.bakend", "descriptor", r"extractors\.looks\.bakend: unknown key.*'backend'"),
        ("extractors.looks.modality", "text", r"extractors\.looks\.modality"),
        ("experiments.shop.dataset", "shp", r"experiments\.shop\.dataset = 'shp': no such name.*'shop'"),
        ("experiments.shop.modalities", {"text": "wrds"}, r"experiments\.shop\.modalities\.text = 'wrds'.*'words'"),
        ("experiments.shop.modalities", {"text": "looks"}, r"modalities\.text = 'looks'.*modality 'image'.*words"),
        ("experiments.shop.modalities", {}, r"experiments\.shop\.modalities = \{\}.*at least 1"),
        ("experiments.shop.model.gama", 1, r"experiments\.shop\.model\.gama: unknown key \(did you mean 'gamma'\?\)"),
        (
            "experiments.shop.model.dropout",
            0.5,
            r"experiments\.shop\.model\.dropout = 0\.5: dropout is not implemented",
        ),
        ("experiments.shop.model.min_sim", 1.5, r"experiments\.shop\.model\.min_sim = 1\.5"),
        ("experiments.shop.training.lr", -1.0, r"experiments\.shop\.training\.lr = -1\.0"),
        ("experiments.shop.training.lr", True, r"experiments\.shop\.training\.lr = True"),
        ("experiments.shop.training.epochs", 0, r"experiments\.shop\.training\.epochs = 0"),
        ("experiments.shop.evaluation.ks", [0], r"experiments\.shop\.evaluation\.ks\.0 = 0"),
        ("experiments.shop.evaluation.ks", [], r"experiments\.shop\.evaluation\.ks = \[\]"),
        ("experiments.shop.preset", "offical", r"experiments\.shop\.preset = 'offical'.*'official'"),
        ("experiments.shop.model.modality_weights", {"image": 1.0}, r"modality_weights.*'text' has no weight"),
        ("experiments.shop.model.modality_weights", {"text": 1.0, "imge": 1.0}, r"modality_weights\.imge.*'image'"),
        (
            "experiments.a/b",
            {"dataset": "shop", "modalities": {"text": "words"}},
            r"experiments\.a/b: use letters, digits",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_path_value_and_the_nearest_name(path: str, value: Any, message: str):
    config = copy.deepcopy(SMALL)
    if path == "experimants":
        config[path] = value
    elif path.startswith("experiments.a/b"):
        config["experiments"]["a/b"] = value
    else:
        config = with_value(path, value)
    with pytest.raises(UserError) as error:
        load_config(config)
    assert re.search(message, str(error.value)), str(error.value)


def test_a_captioner_stores_no_vectors_and_has_no_type_for_them():
    told = {"modality": "caption", "backend": "openai-caption", "model": "m", "url": "http://a/v1", "encoder": "words"}
    load_config(with_value("extractors.told", told | {"dtype": "float32"}))
    with pytest.raises(UserError, match=r"extractors\.told\.dtype = 'float16': captions are text.*set it on 'words'"):
        load_config(with_value("extractors.told", told | {"dtype": "float16"}))


def test_all_faults_are_told_at_once():
    config = with_value("experiments.shop.model.gama", 1)
    config["datasets"]["shop"]["usrs"] = 3
    with pytest.raises(UserError) as error:
        load_config(config)
    assert "gama" in str(error.value)
    assert "usrs" in str(error.value)


def test_scientific_numbers_without_a_dot_are_numbers():
    config = yaml.safe_load(yaml.safe_dump(SMALL))
    config["experiments"]["shop"]["training"]["lr"] = yaml.safe_load("1e-3")
    assert load_config(config).experiments["shop"].training.lr == 0.001


def test_an_earlier_split_is_there_and_not_in_what_is_replaced(tmp_path: Path):
    earlier = tmp_path / "earlier"
    config = load_config(with_value("datasets.shop.split.keep", str(earlier)))
    with pytest.raises(UserError, match=r"datasets\.shop\.split\.keep = .*interactions\.parquet does not exist"):
        data.split_inputs(config, "shop")
    earlier.mkdir()
    for name in ("interactions", "items", "users"):
        (earlier / f"{name}.parquet").touch()
    assert set(data.split_inputs(config, "shop")) == {"ratings", "items", "users"} | {
        f"keep.{name}" for name in ("interactions", "items", "users")
    }
    assert set(data.split_inputs(load_config(SMALL), "shop")) == {"ratings"}
    with pytest.raises(UserError, match="is in the folder that this preparation replaces"):
        data.split_inputs(load_config(with_value("datasets.shop.split.keep", "processed/shop")), "shop")
    with pytest.raises(UserError, match="global-time does not keep labels"):
        load_config(with_value("datasets.shop.split", {"strategy": "global-time", "keep": str(earlier)}))


def test_an_earlier_run_is_there_and_not_in_what_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def inputs(folder: str) -> dict[str, str]:
        config = load_config(with_value("experiments.shop.training.warm_start", folder))
        return runs.train_inputs(config, "shop", runs.selected_run(config, "shop"))

    monkeypatch.setenv("EARLIER", str(tmp_path))
    with pytest.raises(
        UserError, match=r"experiments\.shop\.training\.warm_start = .*model\.safetensors does not exist"
    ):
        inputs("$EARLIER")
    for name in WARM.values():
        (tmp_path / name).touch()
    assert {name: path for name, path in inputs("$EARLIER").items() if name.startswith("warm.")} == {
        f"warm.{name}": f"{tmp_path}/{file}" for name, file in WARM.items()
    }
    with pytest.raises(UserError, match="is in the results that this run replaces"):
        inputs("results/shop/runs/0")


def shop_of(source: str, **changes: Any) -> Config:
    return load_config(SMALL | {"datasets": {"shop": {"source": source, "category": "Toys", **changes}}})


def meta_of(config: Config) -> str:
    return data.prepare_inputs(config, "shop")["meta"]


@pytest.mark.usefixtures("empty_folder")
def test_another_generation_of_a_source_has_other_downloads():
    def fetched(source: str, **changes: Any) -> tuple[str, str]:
        path = meta_of(config := shop_of(source, **changes))
        return path, data.download(config, "shop", path.removeprefix("raw/shop/download/")).identity

    before = fetched("amazon-2014")
    assert before[0] == "raw/shop/download/categoryFiles/meta_Toys.json.gz"
    assert fetched("amazon-2018")[0] == "raw/shop/download/metaFiles2/meta_Toys.json.gz"
    # Mirrors, and settings that only check the file.
    assert fetched("amazon-2014", mirrors=["http://127.0.0.1/elsewhere"]) == before
    facts = {"sha256": {"meta_Toys.json.gz": "0" * 64}, "sizes": {"meta_Toys.json.gz": 5}}
    assert fetched("amazon-2014", **facts) == before


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_that_a_user_put_in_place_is_read_from_there(empty_folder: Path):
    config = shop_of("amazon-2014")
    by_hand = write(empty_folder / "raw/shop/meta_Toys.json.gz", "mine")
    assert meta_of(config) == "raw/shop/meta_Toys.json.gz"
    # The same for a file that an earlier release downloaded to that place.
    record = write(
        empty_folder / "raw/shop/meta_Toys.json.gz.stage.json",
        '{"url": "https://a.org/categoryFiles/meta_Toys.json.gz", "bytes": 4}',
    )
    assert meta_of(config) == "raw/shop/meta_Toys.json.gz"
    # But not for another generation, unless a user replaced the file.
    assert meta_of(shop_of("amazon-2018")) == "raw/shop/download/metaFiles2/meta_Toys.json.gz"
    by_hand.write_text("mine as well")
    assert meta_of(shop_of("amazon-2018")) == "raw/shop/meta_Toys.json.gz"
    record.write_text("damaged")
    assert meta_of(shop_of("amazon-2018")) == "raw/shop/meta_Toys.json.gz"


def test_a_file_in_an_object_storage_is_read_from_there():
    config = shop_of("amazon-2014")
    stored = replace(config, exists={"raw/shop/meta_Toys.json.gz"}.__contains__)
    inputs = data.prepare_inputs(stored, "shop")
    assert inputs["meta"] == "raw/shop/meta_Toys.json.gz"
    assert inputs["ratings"] == "raw/shop/download/categoryFiles/ratings_Toys.csv"


@pytest.mark.parametrize("place", ["raw", "raw/shop", "raw/shop/meta_Toys.json.gz", "raw/shop/download"])
def test_a_dangling_link_in_raw_is_named(empty_folder: Path, place: str):
    link = empty_folder / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("gone")
    with pytest.raises(UserError, match=f"^{place}: is a link to gone, which does not exist"):
        meta_of(shop_of("amazon-2014"))


def test_a_folder_or_file_in_the_wrong_place_is_named(empty_folder: Path):
    (empty_folder / "raw/shop/meta_Toys.json.gz").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^raw/shop/meta_Toys\.json\.gz: is a folder in the place of a file"):
        meta_of(shop_of("amazon-2014"))
    (empty_folder / "raw/shop/meta_Toys.json.gz").rmdir()
    write(empty_folder / "raw/shop/download", "")
    with pytest.raises(UserError, match=r"^raw/shop/download: is a file in the place of a folder"):
        meta_of(shop_of("amazon-2014"))


@pytest.mark.parametrize("place", ["raw", "raw/shop"])
def test_a_file_in_the_place_of_a_raw_folder_is_named(empty_folder: Path, place: str):
    data.check_raw_folders(shop_of("amazon-2014"))
    write(empty_folder / place, "")
    with pytest.raises(UserError, match=rf"^{place}: is a file in the place of a folder"):
        data.check_raw_folders(shop_of("amazon-2014"))


def test_a_folder_without_write_permission_is_named(empty_folder: Path, monkeypatch: pytest.MonkeyPatch):
    (empty_folder / "raw").mkdir()
    monkeypatch.setattr("os.access", lambda *arguments: False)
    with pytest.raises(UserError, match=r"^raw: no permission to write raw/shop/download/"):
        meta_of(shop_of("amazon-2014"))
    write(empty_folder / "raw/shop/download/categoryFiles/meta_Toys.json.gz", "fetched")
    write(empty_folder / "raw/shop/ratings_Toys.csv", "mine")
    assert meta_of(shop_of("amazon-2014")).startswith("raw/shop/download/")


def test_the_run_key_follows_what_decides_the_model_and_nothing_else():
    def key(config: dict[str, Any]) -> str:
        return runs.selected_run(load_config(config), "shop")

    base = key(SMALL)
    same = [
        "experiments.shop.training.device",
        "extractors.words.batch_size",
        "experiments.shop.evaluation.ks",
        "datasets.shop.expected",
    ]
    for path, value in zip(same, ["cpu", 3, [7], {"users": 150}], strict=True):
        assert key(with_value(path, value)) == base, path
    for path, value in [
        ("experiments.shop.training.seed", 7),
        ("experiments.shop.model.gamma", 0.1),
        ("datasets.shop.split.seed", 7),
        ("datasets.shop.kcore", 4),
        ("extractors.words.max_length", 16),
        ("experiments.shop.modalities", {"image": "looks", "text": "words"}),
        ("experiments.shop.modalities", {"text": "words"}),
    ]:
        assert key(with_value(path, value)) != base, path


def test_checks_of_the_raw_files_are_prepares_own_and_no_part_of_a_runs_key():
    def told(**changes: Any) -> tuple[str, str]:
        shop = {"source": "amazon-2014", "category": "Baby", **changes}
        config = load_config(SMALL | {"datasets": {"shop": shop}})
        return runs.selected_run(config, "shop"), data.prepare(config, "shop").identity

    run, preparation = told()
    checks: list[dict[str, Any]] = [
        {"expected": {"users": 19445}},
        {"malformed": 0.5},
        {"sizes": {"ratings_Baby.csv": 1}},
        {"sha256": {"meta_Baby.json.gz": "0" * 64}},
    ]
    for check in checks:
        assert told(**check)[0] == run and told(**check)[1] != preparation, check
    assert told(interactions="reviews")[0] != run


def test_every_key_is_explained_and_the_reference_is_up_to_date():
    readme = (ROOT / "config/README.md").read_text()
    assert reference.tables() in readme, "run: python -m workflow.reference"
    assert json.loads((ROOT / "workflow/schemas/config.schema.json").read_text()) == reference.schema()
    for row in re.findall(r"^\| `.*$", reference.tables(), re.MULTILINE):
        assert re.search(r"\| [^|]+ \|$", row), f"no explanation: {row}"


def test_the_configuration_imports_nothing_heavy():
    code = (
        "import sys, yaml; from workflow.plan.config import load_config; from workflow.plan import comparison, mmrec, pages, runs;"
        "config = load_config(yaml.safe_load(open('config/config.yaml')));"
        "[runs.selected_run(config, name) for name in config.experiments];"
        "print([m for m in ('torch', 'transformers', 'skimage', 'scipy', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.integration
def test_snakemake_refuses_before_any_job_starts(tmp_path: Path):
    checkout = Checkout(tmp_path / "checkout", with_value("experiments.shop.model.gama", 1))
    output = checkout.run("results/shop/metrics.json", check=False)
    assert "experiments.shop.model.gama: unknown key (did you mean 'gamma'?)" in output
    assert "Traceback" not in output
    assert not list((checkout.folder / "raw").glob("*"))


def test_the_config_type_is_immutable():
    config = load_config(SMALL)
    assert isinstance(config, Config)
    with pytest.raises(Exception, match="frozen"):
        config.experiments["shop"].training.lr = 1.0  # type: ignore[misc]


def test_the_users_own_tables_are_checked_when_they_are_planned(tmp_path: Path):
    pairs = tmp_path / "pairs.csv"
    config = with_value("datasets.mine", {"source": "files", "interactions": {"path": str(pairs)}})
    with pytest.raises(UserError, match=r"datasets\.mine\.interactions\.path = '.*pairs\.csv': no such file"):
        data.prepare_inputs(load_config(config), "mine")
    # The files of an object storage are not on this machine.
    assert data.prepare_inputs(load_config(config, local=False), "mine") == {"interactions": str(pairs)}
    pairs.mkdir()
    with pytest.raises(UserError, match=r"datasets\.mine\.interactions\.path = .*: is a folder, not a file"):
        data.prepare_inputs(load_config(config), "mine")
    pairs.rmdir()
    pairs.touch()
    assert data.prepare_inputs(load_config(config), "mine") == {"interactions": str(pairs)}


LR = "experiments={shop: {training: {lr: 0.002, round_valid: null}, evaluation: {ks: [5]}}}"


def test_values_of_config_on_the_command_line_have_the_types_of_yaml():
    # as Snakemake merges them: values within braces are text
    raw = with_value("experiments.shop.training", {"lr": "0.002", "round_valid": "null", "epochs": 4})
    raw["experiments"]["shop"]["evaluation"] = {"ks": ["5"]}
    with pytest.raises(UserError):
        load_config(raw)
    found = load_config(raw, overrides=[LR]).experiments["shop"]
    assert (found.training.lr, found.training.epochs, found.evaluation.ks) == (0.002, 4, [5])


def test_the_command_of_a_result_names_values_of_the_command_line():
    words = command(load_config(SMALL, overrides=[LR]), "results/shop/metrics.json")
    assert shlex.split(words)[3:] == ["--config", LR, "--", "results/shop/metrics.json"]
    secret = "datasets={x: {mirrors: ['https://me:secret@example.com']}}"
    assert "secret" not in command(replace(load_config(SMALL), overrides=[secret]), "x")


@pytest.mark.parametrize("target", ["results/shop/metrics.json", "processed/shop/items.parquet"])
def test_a_target_that_configfile_took_is_named(target: str):
    with pytest.raises(UserError, match=f"--configfile takes {target} .*put `--` before the target"):
        load_config(SMALL, [Path(target)])
