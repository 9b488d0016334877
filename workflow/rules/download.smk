from dataclasses import replace

try:
    data.check_raw_folders(settings)
except UserError as error:
    raise WorkflowError(str(error)) from None

# Files that users put in place, on disk or in an object storage, as they are when the run is planned. Snakemake's `exists`
# knows the storage, but cannot be called in input functions.
settings = replace(
    settings,
    exists=frozenset(filter(exists, data.published_files(settings))).__contains__,
)


# draw the sample shop and write it as raw files
rule generate:
    output:
        reviews="raw/{dataset}/reviews.json.gz",
        meta="raw/{dataset}/meta.json.gz",
        images="raw/{dataset}/pictures.sha256",
        truth="raw/{dataset}/truth.parquet",
        record="raw/{dataset}/generate.stage.json",
    log:
        "logs/{dataset}/generate.log",
    wildcard_constraints:
        dataset=one_of(data.generated(settings)),
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("generate"),
        runtime=needs.runtime("generate"),
    params:
        identity=identity(data.generate),
        arguments=arguments(data.generate),
    shell:
        "exec python -m cm3.datasets.sample.generate {params.arguments} --log {log:q}"


# download one published file that nobody put into raw/{dataset}/: `update` keeps a downloaded file when the job runs again
rule download:
    output:
        file=update("raw/{dataset}/download/{file}"),
    log:
        "logs/{dataset}/download/{file}.log",
    wildcard_constraints:
        dataset=one_of(data.downloaded(settings)),
        file=".+(?<!\\.stage\\.json)",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("download"),
        runtime=needs.runtime("download"),
    params:
        identity=identity(data.download),
        arguments=arguments(data.download),
    shell:
        "exec python -m cm3.datasets.download.stage {params.arguments}"
        " --output record={output.file:q}.stage.json --log {log:q}"
