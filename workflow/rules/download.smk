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


# download one published file, unless it exists: the record is no output, because Snakemake removes the outputs of a job
# before it runs, and would remove a file that somebody else put there
rule download:
    output:
        file="raw/{dataset}/{file}",
    log:
        "logs/{dataset}/download-{file}.log",
    wildcard_constraints:
        dataset=one_of(data.downloaded(settings)),
        file="[^/]+(?<!\\.stage\\.json)",
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
