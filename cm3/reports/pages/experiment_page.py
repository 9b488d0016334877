"""Stage `experiment_page`: the page of an experiment, and its figures."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.cli import stage
from cm3.common.embeddings import read_embeddings
from cm3.common.files import read_json
from cm3.common.interactions import Interactions
from cm3.common.tables import CAPTIONS, MANIFEST, OK, read_table
from cm3.reports.analysis.geometry import draw_sample, measure
from cm3.reports.pages import experiment_charts as charts
from cm3.reports.pages.chart import Chart
from cm3.reports.pages.failures import failures_of
from cm3.reports.pages.figures import save_figures
from cm3.reports.pages.item_cards import Shop, evenly_spaced, read_shop
from cm3.reports.pages.neighbours import by_embedding, by_graph, chosen_items, neighbour_panels
from cm3.reports.pages.page import write_page
from cm3.reports.pages.rivals import rivals
from cm3.reports.pages.settings import features_of, metric_tables, origin, overview, sections, warnings_of
from cm3.reports.pages.thumbnails import BUDGET, thumbnails
from cm3.reports.pages.user_examples import history_panels, list_length

log = logging.getLogger("cm3.reports.pages.experiment_page")

CAPTIONS_SHOWN = 12


def experiment_page(
    *,
    inputs: Mapping[str, Path],
    page_output: Path,
    figures_output: Path,
    changed: Sequence[str] = (),
    studies: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    budget: int = BUDGET,
) -> dict[str, Any]:
    """Write an experiment's page, and its figures as SVG and PNG.

    Args:
        inputs: `metrics` (metrics.json), `per_user`, `recommendations`, and the dataset's `items`, `users` and
            `interactions`; if they exist, `history`, `model`, `user_embeddings`, `item_embeddings`, `manifest`, and for
            each modality M `similarity.M`, `captions.M` and `record.extract.M`, and `record.train` and `record.evaluate`.
        page_output: the page, one self-contained HTML file.
        figures_output: the folder of the figures.
        changed: settings that differ from the defaults, as dotted keys such as "training.lr".
        studies: study -> other experiment -> keys of its runs, whose metrics are shown where they exist
            (`cm3.reports.pages.rivals`).
        budget: total size of the images in characters.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: an input is missing or unreadable.
    """
    metrics = read_json(inputs["metrics"])
    shop = read_shop(inputs)
    with_image = _with_image(inputs.get("manifest"))
    vectors = _vectors(inputs, shop)
    chosen = chosen_items(shop.popularity, with_image)
    neighbours = neighbour_panels(shop, chosen, _neighbour_lists(inputs, metrics, vectors, chosen))
    k = list_length(metrics["config"]["evaluation"]["ks"])
    histories = history_panels(shop, inputs["per_user"], inputs["recommendations"], k)
    captions = _captions(inputs, shop, with_image)
    tables = metric_tables(metrics)
    drawn = _charts(inputs, metrics, vectors, shop.interactions)
    cards = [*_cards(neighbours), *_cards(histories), *_cards(captions)]
    small = thumbnails(inputs.get("manifest"), [card["item"] for card in cards], budget)
    context = {
        "metrics": metrics,
        "overview": overview(metrics) + origin(metrics, _records(inputs)),
        "features": features_of(metrics["config"]),
        "warnings": warnings_of(metrics),
        "tables": tables,
        "rivals": rivals(metrics, shop.interactions, [key for key, *_ in tables["headline"]], studies or {}),
        "sections": sections(metrics["config"], changed),
        "neighbours": neighbours if any(way["cards"] for panel in neighbours for way in panel["ways"]) else [],
        "histories": histories,
        "captions": captions,
        "failures": failures_of(shop, inputs),
        "images": small.uris,
        "left_out": small.left_out,
        **drawn,
    }
    write_page(page_output, "experiment.html", context)
    figures = save_figures(drawn["figures"], figures_output)
    size = page_output.stat().st_size
    log.info("%s: %.1f MB, %d images, %d figures", page_output, size / 1e6, len(small.uris), len(figures))
    return {"bytes": size, "images": len(small.uris), "images_left_out": small.left_out, "figures": len(figures)}


def _with_image(manifest: Path | None) -> set[int]:
    if manifest is None:
        return set()
    status = read_table(manifest, MANIFEST, ["status"]).column("status").to_pylist()
    return {item for item, state in enumerate(status) if state == OK}


def _vectors(inputs: Mapping[str, Path], shop: Shop) -> tuple[np.ndarray, np.ndarray] | None:
    if "item_embeddings" not in inputs:
        return None
    users, _ = read_embeddings(inputs["user_embeddings"], "user_id", shop.user_ids)
    items, _ = read_embeddings(inputs["item_embeddings"], "item_id", shop.item_ids)
    return users, items


def _neighbour_lists(
    inputs: Mapping[str, Path],
    metrics: Mapping[str, Any],
    vectors: tuple[np.ndarray, np.ndarray] | None,
    chosen: list[int],
) -> dict[str, dict[int, list[tuple[int, float]]]]:
    lists = {
        m: by_graph(inputs[f"similarity.{m}"], chosen)
        for m in metrics["config"]["modalities"]
        if f"similarity.{m}" in inputs
    }
    if vectors is not None:
        lists["fused" if lists else "model"] = by_embedding(vectors[1], chosen)
    return lists


def _captions(inputs: Mapping[str, Path], shop: Shop, with_image: set[int]) -> list[dict[str, Any]]:
    found = []
    for name, path in inputs.items():
        if name.startswith("captions."):
            texts = read_table(path, CAPTIONS, ["caption"]).column("caption").to_pylist()
            captioned = [item for item, text in enumerate(texts) if text is not None and item in with_image]
            cards = [shop.card(item) | {"caption": texts[item]} for item in evenly_spaced(captioned, CAPTIONS_SHOWN)]
            with_caption = sum(text is not None for text in texts)
            found.append({"cards": cards, "with_caption": with_caption, "of": len(texts)})
    return found


def _charts(
    inputs: Mapping[str, Path],
    metrics: Mapping[str, Any],
    vectors: tuple[np.ndarray, np.ndarray] | None,
    interactions: Interactions,
) -> dict[str, Any]:
    history = charts.read_history(inputs.get("history"), metrics["training"].get("history_sha256"))
    curves = charts.training_curves(history, metrics["training"].get("best_epoch"))
    geometry = None
    if vectors is not None:
        geometry = measure(*vectors, draw_sample(interactions.matrix("train"), seed=0))
    plane = charts.plane(history, metrics["training"].get("best_epoch"), geometry)
    weights = charts.read_streams(inputs.get("model"))
    streams, stream_rows = None, []
    if weights is not None:
        names = charts.stream_names(metrics["config"]["modalities"], weights.shape[1])
        streams, stream_rows = charts.stream_chart(names, weights), charts.stream_rows(names, weights)
    activity = charts.activity_charts(metrics["data"])
    figures: list[Chart] = [*curves, *(chart for chart in (plane, streams) if chart), *activity]
    return {
        "curves": curves,
        "plane": plane,
        "geometry": geometry,
        "streams": streams,
        "stream_rows": stream_rows,
        "activity": activity,
        "figures": figures,
    }


def _records(inputs: Mapping[str, Path]) -> dict[str, Any]:
    return {name: read_json(inputs[f"record.{name}"]) for name in ("train", "evaluate") if f"record.{name}" in inputs}


def _cards(part: Any) -> list[dict[str, Any]]:
    """Return every item card in a part of the page."""
    if isinstance(part, dict):
        return [part] if "item" in part else [card for value in part.values() for card in _cards(value)]
    return [card for value in part for card in _cards(value)] if isinstance(part, list) else []


def main() -> None:
    """Run the stage: inputs of `experiment_page`; outputs page, figures, record."""
    with stage("cm3.reports.pages.experiment_page") as call:
        facts = experiment_page(
            inputs=call.inputs,
            page_output=call.outputs["page"],
            figures_output=call.outputs["figures"],
            changed=call.spec.get("changed", ()),
            studies=call.runtime.get("studies"),
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
