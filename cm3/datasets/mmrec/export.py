"""Stage: export an experiment's data in the format of the MMRec toolbox, to run MMRec's models on them."""

import csv
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from cm3.common.cli import stage
from cm3.common.files import atomic
from cm3.common.tables import INTERACTIONS, ITEMS, SPLITS, USERS, read_table
from cm3.datasets.mmrec.format import ITEM, ITEM_ID, LABEL, RATING, TIME, USER, USER_ID, interactions_file, vectors_file

log = logging.getLogger("cm3.datasets.mmrec.export")


def export(
    experiment: str, modalities: Sequence[str], inputs: dict[str, Path], outputs: dict[str, Path]
) -> dict[str, Any]:
    """Write the interactions with their split, the mappings of ids, MMRec's configuration and a readme.

    MMRec counts items up to the largest number with an interaction, so items without interactions come first
    (`item_order`). Without such items, the default of `cold_items`, the numbers are those of items.parquet.

    Args:
        experiment: its name, which becomes the name of MMRec's dataset.
        modalities: in the experiment's order.
        inputs: interactions, items and users; `vectors.MODALITY`, written by `cm3.datasets.mmrec.export_vectors`, are not read.
        outputs: inter, item_ids, user_ids, settings (yaml) and readme.

    Returns:
        the numbers of users, items, items without interactions, and interactions.
    """
    interactions = read_table(inputs["interactions"], INTERACTIONS)
    item_ids = read_table(inputs["items"], ITEMS).column("item_id")
    user_ids = read_table(inputs["users"], USERS).column("user_id")
    order = item_order(interactions, len(item_ids))
    numbers = np.argsort(order).astype(np.int64)
    _write_interactions(outputs["inter"], interactions, numbers)
    _write_mapping(outputs["item_ids"], (ITEM_ID, ITEM), item_ids.take(pa.array(order)).to_pylist())
    _write_mapping(outputs["user_ids"], (USER_ID, USER), user_ids.to_pylist())
    _write_text(outputs["settings"], _settings(experiment, modalities))
    _write_text(outputs["readme"], _readme(experiment, modalities))
    facts = {
        "users": len(user_ids),
        "items": len(item_ids),
        "items_without_interaction": len(item_ids) - pc.count_distinct(interactions.column("item")).as_py(),
        "interactions": len(interactions),
    }
    log.info("%d users, %d items (%d without interactions), %d interactions", *facts.values())
    return facts


def item_order(interactions: pa.Table, items: int) -> np.ndarray:
    """Return (items,) int64: the item of items.parquet with number 0, 1, 2, ... in MMRec.

    Items without interactions come first, then all others, both in the order of items.parquet.
    """
    known = np.zeros(items, dtype=bool)
    known[interactions.column("item").to_numpy()] = True
    return np.argsort(known, kind="stable")


def _write_interactions(path: Path, interactions: pa.Table, numbers: np.ndarray) -> None:
    columns = {
        USER: interactions.column("user"),
        ITEM: pa.array(numbers[interactions.column("item").to_numpy()]),
        RATING: interactions.column("rating"),
        TIME: interactions.column("timestamp"),
        LABEL: pc.index_in(interactions.column("split").cast(pa.string()), value_set=pa.array(SPLITS)),
    }
    # A source without ratings or times has columns of nulls.
    kept = {name: values for name, values in columns.items() if values.null_count < len(values)}
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(("\t".join(kept) + "\n").encode())
        options = pa_csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
        pa_csv.write_csv(pa.table(kept), file, options)


def _write_mapping(path: Path, header: Sequence[str], ids: Sequence[str]) -> None:
    _write_rows(path, header, ((name, number) for number, name in enumerate(ids)))


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _places(modalities: Sequence[str]) -> dict[str, str]:
    """Return the files of MMRec's two modalities, vision and text: image and text, else another modality, else "none".

    A file "none" does not exist, so that MMRec does not find the image_feat.npy of an earlier configuration.
    """
    left = [modality for modality in modalities if modality not in ("image", "text")]
    chosen = {}
    for place, first in (("vision", "image"), ("text", "text")):
        modality = first if first in modalities else left.pop(0) if left else None
        chosen[place] = vectors_file(modality) if modality else "none"
    return chosen


def _settings(experiment: str, modalities: Sequence[str]) -> str:
    places = _places(modalities)
    values = {
        "USER_ID_FIELD": USER,
        "ITEM_ID_FIELD": ITEM,
        "TIME_FIELD": TIME,
        "filter_out_cod_start_users": True,
        "inter_file_name": interactions_file(experiment),
        "inter_splitting_label": LABEL,
        "vision_feature_file": places["vision"],
        "text_feature_file": places["text"],
        "user_graph_dict_file": "user_graph_dict.npy",
        "field_separator": "\t",
    }
    # JSON literals are YAML literals, including tabs and quotes.
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def _readme(experiment: str, modalities: Sequence[str]) -> str:
    places = _places(modalities)
    there = ", ".join(map(vectors_file, modalities))
    return f"""The data of experiment {experiment}, in the layout of MMRec (https://github.com/enoche/MMRec).

From here, with MMRec checked out at MMREC:

    cp -r {experiment} MMREC/data/
    cp {experiment}.yaml MMREC/src/configs/dataset/
    cd MMREC/src && python main.py -d {experiment} -m FREEDOM

{experiment}.inter holds users and items as numbers, and the split as x_label: 0 train, 1 valid, 2 test.
i_id_mapping.csv and u_id_mapping.csv map numbers to original ids. Row i of a feature file belongs to itemID i.
Feature files: {there}.
MMRec uses two feature files. {experiment}.yaml names {places["vision"]} as vision_feature_file and {places["text"]} as
text_feature_file; to use another, write its name there. MMRec ignores a file that does not exist.

MMRec does not support missing vectors: items without vector have the mean of all others, and are listed in
MODALITY_missing.csv.

Some of MMRec's models keep item graphs in its data folder (*_adj_*.pt) and read them again even if the features have
changed. So remove the old folder before you copy a new one, and don't link to this one.
"""


def main() -> None:
    """Run the stage. Spec: experiment, modalities. Inputs and outputs: as `export`, and the output record."""
    with stage("cm3.datasets.mmrec.export") as call:
        call.record.update(export(call.spec["experiment"], call.spec["modalities"], call.inputs, call.outputs))


if __name__ == "__main__":
    main()
