# draw and write the embedded shop
rule generate:
    output:
        reviews="raw/{dataset}/reviews.json.gz",
        meta="raw/{dataset}/meta.json.gz",
        pictures="raw/{dataset}/pictures.sha256",
        truth="raw/{dataset}/truth.parquet",
        record="raw/{dataset}/generate.stage.json",
    log:
        "logs/{dataset}/generate.log",
    wildcard_constraints:
        dataset=one_of(plan.generated()),
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: canonical(plan.generate_spec(wildcards.dataset)),
        code=lambda wildcards: plan.code("sources.sample"),
        files=named_files,
    shell:
        "exec python -m sources.sample --spec {params.spec:q} --code {params.code} {params.files} --log {log:q}"


# fetch one published file
rule download:
    output:
        file="raw/{dataset}/{file}",
        record="raw/{dataset}/{file}.stage.json",
    log:
        "logs/{dataset}/download-{file}.log",
    wildcard_constraints:
        dataset=one_of(plan.downloaded()),
        file="[^/]+(?<!\\.stage\\.json)",
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: canonical(
            plan.download_spec(wildcards.dataset, wildcards.file)
        ),
        files=named_files,
    shell:
        "exec python -m sources.download --spec {params.spec:q} {params.files} --log {log:q}"
