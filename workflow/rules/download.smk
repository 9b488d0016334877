# draw and write the embedded shop
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
        dataset=one_of(plan.generated()),
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("generate"),
        runtime=needs.runtime("generate"),
    params:
        identity=identity(lambda wildcards: plan.generate(wildcards.dataset)),
        arguments=arguments(lambda wildcards: plan.generate(wildcards.dataset)),
    shell:
        "exec python -m cm3.datasets.sample.generate {params.arguments} --log {log:q}"


# fetch one published file, unless it is there: the record beside it is no output, or Snakemake would delete what
# somebody put there by hand
rule download:
    output:
        file="raw/{dataset}/{file}",
    log:
        "logs/{dataset}/download-{file}.log",
    wildcard_constraints:
        dataset=one_of(plan.downloaded()),
        file="[^/]+(?<!\\.stage\\.json)",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("download"),
        runtime=needs.runtime("download"),
    params:
        identity=identity(
            lambda wildcards: plan.download(wildcards.dataset, wildcards.file)
        ),
        arguments=arguments(
            lambda wildcards: plan.download(wildcards.dataset, wildcards.file)
        ),
    shell:
        "exec python -m cm3.datasets.download.stage {params.arguments}"
        " --output record={output.file:q}.stage.json --log {log:q}"
