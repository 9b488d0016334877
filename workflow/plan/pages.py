"""Pages: the files that the page of an experiment shows, and the tasks of rendering pages."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from cm3.config import Evaluation, Training
from workflow.plan import features, runs
from workflow.plan.config import Config
from workflow.plan.folder import digest_of_folder
from workflow.plan.task import Task

DEFAULT_RULE, DEFAULT_TARGET = "all", "results/sample/metrics.json"
"""The rule of the Snakefile that runs without a target, and what it asks for."""

TEMPLATES = Path(__file__).resolve().parents[2] / "cm3/reports/pages/templates"


def existing_pages(config: Config, targets: Iterable[str]) -> list[str]:
    """Return the pages that exist of the experiments and studies whose results are among the targets.

    They are brought up to date with these results: a page next to newer numbers would show the run before.
    """
    pages = []
    for target in targets:
        path = PurePath(os.path.relpath(target)) if target != DEFAULT_RULE else PurePath(DEFAULT_TARGET)
        parts = path.parts
        if len(parts) != 3 or parts[0] != "results":
            continue
        page = "report.html" if parts[1] in config.experiments else "comparison.html"
        known = parts[1] in config.experiments or parts[1] in config.studies
        if known and path.name != page and Path(path.with_name(page)).is_file():
            pages.append(str(path.with_name(page)))
    return pages


def experiment_page_inputs(config: Config, experiment: str) -> dict[str, str]:
    """Return the published files of an experiment, and the tables, images, captions and graphs that its page shows.

    Images are shown if the experiment reads them, or if they need no download.
    """
    chosen = config.experiments[experiment]
    dataset = chosen.dataset
    published = ["metrics.json", "per_user.parquet", "recommendations.parquet"]
    published.append(runs.model_file(config, experiment))
    if chosen.model.exports == "embeddings":
        published += ["history.csv", "user_embeddings.parquet", "item_embeddings.parquet"]
    paths = (
        runs.tables(config, experiment)
        | runs.records(config, experiment)
        | {Path(file).stem: f"results/{experiment}/{file}" for file in published}
    )
    reads_images = any("manifest" in config.extractors[name].needs() for name in chosen.modalities.values())
    if reads_images or config.datasets[dataset].images_spec()["find"] == "folder":
        paths["manifest"] = f"processed/{dataset}/images/manifest.parquet"
    for modality, extractor in chosen.modalities.items():
        extracted = features.features_path(config, dataset, extractor)
        paths[f"record.extract.{modality}"] = features.record_path(extracted)
        if features.encoder_of(config, extractor) is not None:
            paths[f"captions.{modality}"] = features.captions_path(config, dataset, extractor)
    return paths | {f"similarity.{modality}": path for modality, path in runs.graphs_of(config, chosen).items()}


def experiment_page(config: Config, experiment: str) -> Task:
    """Return the task of rendering the page of an experiment, which marks its settings that are not the default.

    Models of studies are shown where their comparisons exist already: they are no inputs, which would train them.
    """
    spec = {"changed": changed_settings(config, experiment)}
    return _page("experiment-page", spec, {"studies": _compared_models(config, experiment)})


def changed_settings(config: Config, experiment: str) -> list[str]:
    """Return the settings of an experiment and its dataset that differ from the defaults, as dotted keys of metrics.json."""
    chosen = config.experiments[experiment]
    dataset = config.datasets[chosen.dataset]
    model = _with_defaults(chosen.model)
    usual = replace(
        chosen,
        model=model,
        training=Training.model_validate({**model.training_defaults, **model.presets["default"].get("training", {})}),
        evaluation=Evaluation.model_validate({}),
    )
    plain = _with_defaults(dataset)
    sections = {
        "prepare": (dataset.prepare_spec(), plain.prepare_spec()),
        "split": (dataset.split_spec(), plain.split_spec()),
        "images": (dataset.images_spec(), plain.images_spec()),
        "model": (chosen.model.identity(), usual.model.identity()),
        "training": (chosen.training_settings(), usual.training_settings()),
        "evaluation": (chosen.evaluation.identity(), usual.evaluation.identity()),
    }
    return [
        f"{name}.{key}"
        for name, (own, default) in sections.items()
        for key, value in own.items()
        if value != default.get(key) and key != "expected"
    ]


def _with_defaults(settings: Any) -> Any:
    """Return a section with the same required settings, and the defaults of all others."""
    fields = type(settings).model_fields
    required = {name: getattr(settings, name) for name, field in fields.items() if field.is_required()}
    try:
        return type(settings)(**required)
    except ValueError:  # settings that are required together
        return settings


def _compared_models(config: Config, experiment: str) -> dict[str, dict[str, list[str]]]:
    """Return for each study of the experiment its other models, with the keys of their runs on the dataset's own split."""
    own = config.experiments[experiment].model_name
    found = {}
    for name, study in config.studies.items():
        if experiment in study.points:
            others = {
                other: sorted(
                    {
                        runs.run_key(config, chosen)
                        for _, _, chosen in study.settings(other)
                        if chosen.split_seed is None
                    }
                )
                for other in study.points
                if config.experiments[other].model_name != own and not config.experiments[other].controls
            }
            found[name] = others
    return found


def experiment_labels(config: Config, experiment: str) -> dict[str, str]:
    """Return what distinguishes the page of an experiment in Snakemake's report."""
    chosen = config.experiments[experiment]
    return {
        "experiment": experiment,
        "model": chosen.model_name,
        "dataset": chosen.dataset,
        "features": ", ".join(chosen.feature_names().values())
        or ("lists" if chosen.model.exports == "lists" else "none"),
    }


def study_labels(config: Config, study: str) -> dict[str, str]:
    """Return what distinguishes the page of a study in Snakemake's report."""
    points = config.studies[study].points
    dataset = config.experiments[next(iter(points))].dataset
    return {"study": study, "dataset": dataset, "experiments": str(len(points))}


def study_page(config: Config) -> Task:
    """Return the task of rendering the page of a study."""
    return _page("study-page", {}, {})


def _page(stage: str, spec: dict[str, Any], runtime: dict[str, Any]) -> Task:
    # An edit of the templates renders the pages again, without a new version.
    return Task(stage, spec, runtime=runtime, decides=[digest_of_folder(TEMPLATES), spec])
