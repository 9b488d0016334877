"""Golden outputs of the dataset stages: the sample generator, prepare for each source, the split strategies."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from amazon_shop import literal, review, review_2023, run
from golden import check_golden, digest, summary
from oracles_sources import dataset, run_prepare
from PIL import Image

from cm3.common.stages import STAGES
from cm3.common.tables import INTERACTIONS, ITEMS, USERS, read_table, write_table
from cm3.datasets.mmrec.export import export
from cm3.datasets.reader import RATINGS
from cm3.datasets.registry import parse_dataset, source_spec, source_specs
from cm3.datasets.sample.generate import TRUTH, make_sample
from cm3.datasets.splits import split_ratings

# (user, item, rating, Unix seconds): with duplicate pairs and rows, and users and items on both sides of the 3-core.
ROWS = [
    (user, (user // 3 * 3 + 2 * step) % 9, 1.0 + (user * step) % 5, 1_400_000_000 + 86_400 * ((user * step) % 7))
    for user in range(9)
    for step in range(6)
    if (user * 7 + step * 5) % 9 > 2
]
ROWS += [(7, 8, 2.0, 1_400_000_000)]
ROWS += [(user, item, 6.0 - rating, time) for user, item, rating, time in ROWS[:9]]
MARKUP = "<p>Soft &amp; warm</p><script>x()</script> < 10 cm"


def prepared(folder: Path, stats: dict[str, Any]) -> dict[str, Any]:
    """Digests of the tables that the prepare stage wrote, with their first rows to see what changed."""
    tables = {"ratings": RATINGS, "items": ITEMS, "users": USERS}
    rows = {name: read_table(folder / f"{name}.parquet", schema).to_pylist() for name, schema in tables.items()}
    files = {name: {"rows": len(found), "first": found[0], "digest": digest(found)} for name, found in rows.items()}
    return {**files, "stats": digest(stats)}


def amazon(folder: Path, source: str, kind: str, lines: list[str], meta: list[str]) -> dict[str, Any]:
    return run(folder, source, {kind: lines, "meta": meta}, interactions=kind, kcore=3, malformed=0.2)


def sample(folder: Path) -> dict[str, Any]:
    lines = [review(f"A{u}", f"B{i}", r, t) for u, i, r, t in ROWS]
    published = folder / "raw/mine"
    published.mkdir(parents=True)
    meta = [literal(f"B{i}", brand="Tarn &amp; Co", categories=[["Gifts", f"No. {i}"]], price=2.5) for i in range(12)]
    for name, rows in (("reviews", lines), ("meta", meta)):
        (published / f"{name}.json.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    return run_prepare(folder, {"source": "sample", "kcore": 3, "cold_items": "keep"})


def files(folder: Path) -> dict[str, Any]:
    table = "user,item,rating,timestamp\n" + "".join(f"u{u},i{i},{r},{t}\n" for u, i, r, t in ROWS)
    items = "".join(
        json.dumps({"item_id": f"i{i}", "title": f"T{i} {MARKUP}", "image": f"{i}.jpg"}) + "\n" for i in range(8)
    )
    return dataset(folder, table, items, kcore=3, unknown_items="keep")()


def amazon_2014(folder: Path) -> dict[str, Any]:
    lines = [*(f"A{u},B{i},{r},{t}" for u, i, r, t in ROWS), "A1,B1,nan,1400000000", "A1,B1"]
    meta = [
        literal(f"B{i}", description=MARKUP, salesRank={"Baby": i + 1}, imUrl=f"http://a.org/{i}.jpg") for i in range(8)
    ]
    return amazon(folder, "amazon-2014", "ratings", lines, meta)


def amazon_2018(folder: Path) -> dict[str, Any]:
    lines = [*(review(f"A{u}", f"B{i}", r, t) for u, i, r, t in ROWS), review("", "B1")]
    meta = [
        json.dumps(
            {
                "asin": f"B{i}",
                "title": f"T{i}",
                "brand": "by Nord",
                "category": ["Gifts", "Gifts", "Cards"],
                "price": "$1,250.00 - $2,000.00",
                "rank": f"{i + 1} in Gift Cards (",
                "details": {"Size:": "S"},
                "image": [f"http://a.org/{i}._SX38_.jpg"],
            }
        )
        for i in range(8)
    ]
    return amazon(folder, "amazon-2018", "reviews", lines, meta)


def amazon_2023(folder: Path) -> dict[str, Any]:
    lines = [review_2023(f"A{u}", f"B{i}", r, t * 1000) for u, i, r, t in ROWS]
    images = [{"variant": "PT01", "large": "http://a.org/2.jpg"}, {"variant": "MAIN", "hi_res": "http://a.org/1.jpg"}]
    meta = [
        json.dumps({"parent_asin": f"B{i}", "title": f"T{i}", "store": "Nord", "price": i, "images": images})
        for i in range(8)
    ]
    return amazon(folder, "amazon-2023", "reviews", lines, meta)


def microlens(folder: Path) -> dict[str, Any]:
    pairs = ["user,item,timestamp", *(f"{u},{i},{t}123" for u, i, _, t in ROWS), "x,y"]
    (folder / "MicroLens-50k_pairs.csv").write_text("\n".join(pairs))
    (folder / "MicroLens-50k_titles.csv").write_text("item,title\n" + "".join(f'{i},"T{i}, ""x"""\n' for i in range(8)))
    return run_prepare(folder, {"source": "microlens", "folder": str(folder), "kcore": 3, "malformed": 0.2})


def mmrec(folder: Path) -> dict[str, Any]:
    data = folder / "shop"
    data.mkdir()
    labels = {(u, i): (u + i) % 3 for u, i, _, _ in ROWS}
    lines = ["userID\titemID\trating\ttimestamp\tx_label"]
    lines += [f"{u}\t{i}\t{r}\t{t}\t{labels[u, i]}" for u, i, r, t in ROWS]
    (data / "shop.inter").write_text("\n".join(lines) + "\n")
    (data / "i_id_mapping.csv").write_text("asin\titemID\n" + "".join(f"B{9 - i}\t{i}\n" for i in range(10)))
    (data / "meta-shop.csv").write_text(
        "itemID,title,categories\n" + "".join(f"{i},T{i},\"['a', ['b']]\"\n" for i in range(8))
    )
    return run_prepare(folder, {"source": "mmrec", "folder": str(data)})


def recbole(folder: Path) -> dict[str, Any]:
    data = folder / "shop"
    data.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"A{u}\tB{i}\t{r}\t{t}" for u, i, r, t in ROWS]
    (data / "shop.inter").write_text("\n".join([*lines, "A1\t\t1\t1400000000"]) + "\n")
    items = ["item_id:token\ttitle:token_seq\tcategories:token_seq\timage:token"]
    items += [f'B{i}\t"T{i} ""x"" &amp; y"\tGifts Cards\thttp://a.org/{i}.jpg' for i in range(8)]
    (data / "shop.item").write_text("\n".join(items) + "\n")
    return run_prepare(folder, {"source": "recbole", "folder": "shop", "kcore": 3})


PREPARE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sample": sample,
    "files": files,
    "amazon-2014": amazon_2014,
    "amazon-2018": amazon_2018,
    "amazon-2023": amazon_2023,
    "microlens": microlens,
    "mmrec": mmrec,
    "recbole": recbole,
}


def test_every_versioned_source_has_a_golden_output():
    assert set(PREPARE) == {name for name, spec in source_specs().items() if spec.version is not None}


@pytest.mark.parametrize("source", PREPARE)
def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    monkeypatch.chdir(tmp_path)
    outputs = {"stage version": STAGES["prepare"].version, **prepared(tmp_path, PREPARE[source](tmp_path))}
    check_golden(f"prepare-{source}", source_spec(source).version, outputs)


def test_generate(tmp_path: Path):
    settings = {"source": "sample", "users": 30, "items": 25, "corrupt_pictures": 3, "picture_size": 32}
    spec = parse_dataset("shop", settings, "datasets.shop").generate_spec()
    assert spec is not None
    names = {
        "reviews": "reviews.json.gz",
        "meta": "meta.json.gz",
        "images": "pictures.sha256",
        "truth": "truth.parquet",
    }
    facts = make_sample(spec, **{name: tmp_path / file for name, file in names.items()})
    truth = read_table(tmp_path / "truth.parquet", TRUTH)
    lines = {n: gzip.decompress((tmp_path / names[n]).read_bytes()).decode().splitlines() for n in ("reviews", "meta")}
    state = truth.column("picture").to_pylist()
    shown = [item for item, kind in zip(truth.column("item_id").to_pylist(), state, strict=True) if kind == "ok"]
    pixels = [np.asarray(Image.open(tmp_path / f"images/{item}.jpg").resize((4, 4))) / 255 for item in shown]
    outputs = {
        "facts": facts,
        **{name: {"lines": len(found), "first": found[0], "digest": digest(found)} for name, found in lines.items()},
        "attributes": digest(truth.drop_columns("popularity").to_pylist()),
        "popularity": summary(truth.column("popularity").to_numpy()),
        # With a tolerance: decoders of JPEG differ in the last bit.
        "images": summary(np.stack(pixels)),
    }
    check_golden("generate", STAGES["generate"].version, outputs, tolerance=0.02)


def ratings(path: Path) -> Path:
    n = np.arange(240)
    user = np.sort(n % 16) // 2
    time = 1_400_000_000 + (n * 37) % 61
    columns = {"user": user, "item": n % 30, "rating": n % 5 + 1.0, "timestamp": time, "published": n % 3}
    write_table(
        path, pa.table({name: pa.array(v).cast(RATINGS.field(name).type) for name, v in columns.items()}), RATINGS
    )
    return path


@pytest.mark.parametrize("strategy", ["random", "user-time", "global-time", "leave-one-out", "published"])
def test_split(tmp_path: Path, strategy: str):
    facts = split_ratings(ratings(tmp_path / "ratings.parquet"), tmp_path / "interactions.parquet", strategy, 7)
    labels = read_table(tmp_path / "interactions.parquet", INTERACTIONS).column("split").to_pylist()
    outputs = {"facts": facts, "labels": "".join(label[1] for label in labels)}
    check_golden(f"split-{strategy}", STAGES["split"].version, outputs)


def test_split_that_keeps_labels(tmp_path: Path):
    ids = {"item": 30, "user": 8}
    tables = {}
    for name, count in ids.items():
        path = tmp_path / f"{name}s.parquet"
        schema = {"item": ITEMS, "user": USERS}[name]
        columns: dict[str, Any] = {name: range(count), f"{name}_id": [f"{name}{n:02}" for n in range(count)]}
        nulls = {field.name: pa.nulls(count, field.type) for field in schema if field.name not in columns}
        arrays = {n: pa.array(v).cast(schema.field(n).type) for n, v in columns.items()}
        write_table(path, pa.table({field.name: (arrays | nulls)[field.name] for field in schema}), schema)
        tables |= {f"{name}s": path, f"keep.{name}s": path}
    earlier = tmp_path / "earlier.parquet"
    source = ratings(tmp_path / "ratings.parquet")
    few = tmp_path / "few.parquet"
    write_table(few, read_table(source, RATINGS).slice(0, 150), RATINGS)
    split_ratings(few, earlier, "random", 3)
    outputs = {}
    for strategy in ("random", "user-time", "leave-one-out"):
        target = tmp_path / f"{strategy}.parquet"
        facts = split_ratings(source, target, strategy, 7, {**tables, "keep.interactions": earlier})
        labels = read_table(target, INTERACTIONS).column("split").to_pylist()
        outputs[strategy] = {"facts": facts, "labels": "".join(label[1] for label in labels)}
    check_golden("split-keep", STAGES["split"].version, outputs)


def test_mmrec_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    mmrec(tmp_path)
    split_ratings(tmp_path / "ratings.parquet", tmp_path / "interactions.parquet", "published", 7)
    inputs = {name: tmp_path / f"{name}.parquet" for name in ("interactions", "items", "users")}
    written = {"inter": "x.inter", "item_ids": "i.csv", "user_ids": "u.csv", "settings": "x.yaml"}
    outputs = {name: tmp_path / file for name, file in (written | {"readme": "README.txt"}).items()}
    facts = export("x", ["text", "video"], inputs, outputs)
    texts = {name: (tmp_path / file).read_text() for name, file in written.items()}
    check_golden("mmrec", STAGES["mmrec"].version, {"facts": facts, **texts})
