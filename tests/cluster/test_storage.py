"""The whole DAG with its files in an object storage on loopback, as profiles/kubernetes has them, on this machine."""

import copy
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import SMALL, Checkout

boto3 = pytest.importorskip("boto3", reason="no S3 client: pip install -r requirements-dev.txt")
pytest.importorskip("snakemake_storage_plugin_s3", reason="no S3 storage: pip install -r requirements-cluster.txt")
server = pytest.importorskip("moto.server", reason="no object storage: pip install -r requirements-dev.txt")

BUCKET, PREFIX = "cm3-data", "lab/"
TARGETS = ("results/shop/metrics.json", "results/compared/comparison.html")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """An empty bucket, and in the environment what Snakemake needs to reach it."""
    storage = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    storage.start()
    host, port = storage.get_host_and_port()
    settings = {"endpoint_url": f"http://{host}:{port}", "access_key": "key", "secret_key": "secret"}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(f"SNAKEMAKE_STORAGE_S3_{name.upper()}", value)
        client = boto3.resource(
            "s3",
            endpoint_url=settings["endpoint_url"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        yield client.create_bucket(Bucket=BUCKET)
    storage.stop()


def config() -> dict[str, Any]:
    """The small shop by its images, compared with a model that leaves item weights."""
    whole = copy.deepcopy(SMALL)
    whole["experiments"]["shop"]["modalities"] = {"image": "looks"}
    whole["experiments"]["ease"] = {"like": "shop", "model": {"name": "ease"}}
    whole["studies"] = {"compared": {"experiments": ["shop", "ease"], "seeds": [42]}}
    return whole


@pytest.fixture(scope="module")
def finished(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("storage") / "shop", config())
    checkout.run(*options(), *TARGETS)
    return checkout


def options() -> list[str]:
    return [
        "--default-storage-provider",
        "s3",
        "--default-storage-prefix",
        f"s3://{BUCKET}/{PREFIX.rstrip('/')}",
        "--keep-storage-local-copies",
    ]


def stored(bucket: Any) -> dict[str, Any]:
    return {thing.key.removeprefix(PREFIX): thing for thing in bucket.objects.all() if thing.key.startswith(PREFIX)}


def read(bucket: Any, path: str) -> Any:
    return json.loads(stored(bucket)[path].get()["Body"].read())


def test_results_are_in_the_bucket_only(finished: Checkout, bucket: Any):
    found = stored(bucket)
    assert set(TARGETS) <= found.keys()
    assert {"raw/shop/meta.json.gz", "processed/shop/items.parquet", "results/compared/comparison.csv"} <= found.keys()
    assert any(path.startswith("results/compared/figures/") for path in found)
    made = [path for folder in ("raw", "results") for path in (finished.folder / folder).glob("**/*") if path.is_file()]
    assert [path.name for path in made] == [".run.lock"]


def test_metrics_and_comparison_agree(finished: Checkout, bucket: Any):
    metrics, compared = read(bucket, TARGETS[0]), read(bucket, "results/compared/comparison.json")
    assert list(compared["experiments"]) == ["shop", "ease"]
    mean = compared["experiments"]["shop"]["metrics"]["recall@10"]["mean"]
    assert mean == pytest.approx(metrics["test"]["recall@10"], abs=1e-12)
    assert metrics["coverage"]["image"]["ok"] > 40


def test_nothing_runs_again(finished: Checkout):
    assert finished.planned(*options(), *TARGETS) == {}


def test_reported_folders_are_those_of_the_plan(finished: Checkout, bucket: Any):
    compared = read(bucket, "results/compared/comparison.json")
    assert all(cell["folder"].startswith("results/") for cell in compared["cells"])
    assert "storage/s3" not in json.dumps(compared)


def test_raw_files_in_the_bucket_are_used_and_stay(bucket: Any, tmp_path: Path):
    """A user's file is read from the bucket; one that is not there is downloaded into it, once."""
    published = tmp_path / "published/categoryFiles"
    published.mkdir(parents=True)
    rows = [f"A{user},B{item},5.0,{1_300_000_000 + user + item}\n" for user in range(9) for item in range(9)]
    (published / "ratings_Toys.csv").write_text("".join(rows))
    meta = gzip.compress("".join(f"{ {'asin': f'B{item}', 'title': 'a thing'}!r}\n" for item in range(9)).encode())
    bucket.put_object(Key=f"{PREFIX}raw/toys/meta_Toys.json.gz", Body=meta)
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "published"), **options)

        def log_message(self, *arguments: Any) -> None:
            if self.command == "GET":  # the forecast asks for sizes with HEAD
                asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as mirror:
        threading.Thread(target=mirror.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        url = f"http://127.0.0.1:{mirror.server_port}"
        toys = {"source": "amazon-2014", "category": "Toys", "mirrors": [url]}
        experiment = {"dataset": "toys", "model": {"name": "mostpop"}}
        whole = {"datasets": {"toys": toys}, "extractors": {}, "experiments": {"toys": experiment}}
        checkout = Checkout(tmp_path / "checkout", whole)
        checkout.run(*options(), "processed/toys/stats.json")
        assert asked == ["/categoryFiles/ratings_Toys.csv"]
        assert checkout.planned(*options(), "processed/toys/stats.json") == {}
        for _ in range(2):
            checkout.run(*options(), "-F", "--", "processed/toys/stats.json")
        mirror.shutdown()
    assert stored(bucket)["raw/toys/meta_Toys.json.gz"].get()["Body"].read() == meta
    assert "raw/toys/download/categoryFiles/ratings_Toys.csv" in stored(bucket)
