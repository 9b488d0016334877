"""Pages: the files that the page of an experiment shows, and the tasks of rendering pages."""

from pathlib import Path

from workflow.plan import features, runs
from workflow.plan.config import Config
from workflow.plan.folder import digest_of_folder
from workflow.plan.task import Task

TEMPLATES = Path(__file__).resolve().parents[2] / "cm3/reports/pages/templates"


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
    paths = runs.tables(config, experiment) | {Path(file).stem: f"results/{experiment}/{file}" for file in published}
    reads_images = any("manifest" in config.extractors[name].needs() for name in chosen.modalities.values())
    if reads_images or config.datasets[dataset].images_spec()["find"] == "folder":
        paths["manifest"] = f"processed/{dataset}/images/manifest.parquet"
    for modality, extractor in chosen.modalities.items():
        extracted = features.features_path(config, dataset, extractor)
        paths[f"record.extract.{modality}"] = features.record_path(extracted)
        if features.encoder_of(config, extractor) is not None:
            paths[f"captions.{modality}"] = features.captions_path(config, dataset, extractor)
    return paths | {f"similarity.{modality}": path for modality, path in runs.graphs_of(config, chosen).items()}


def experiment_page(config: Config) -> Task:
    """Return the task of rendering the page of an experiment."""
    return _page("experiment-page")


def study_page(config: Config) -> Task:
    """Return the task of rendering the page of a study."""
    return _page("study-page")


def _page(stage: str) -> Task:
    # An edit of the templates renders the pages again, without a new version.
    return Task(stage, {}, decides=digest_of_folder(TEMPLATES))
