# raw files to k-cored tables
rule prepare:
    input:
        unpack(
            lambda wildcards: named(
                plan.dataset(wildcards.dataset).prepare_inputs(wildcards.dataset)
            )
        ),
    output:
        ratings="processed/{dataset}/ratings.parquet",
        items_="processed/{dataset}/items.parquet",
        users="processed/{dataset}/users.parquet",
        stats="processed/{dataset}/stats.json",
        record="processed/{dataset}/prepare.stage.json",
    log:
        "logs/{dataset}/prepare.log",
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: canonical(plan.dataset(wildcards.dataset).prepare_spec()),
        code=lambda wildcards: plan.source_code(wildcards.dataset, "prepare"),
        files=named_files,
    shell:
        "exec python -m sources.prepare --spec {params.spec:q} --code {params.code} {params.files} --log {log:q}"


# label interactions train, valid, test
rule split:
    input:
        ratings="processed/{dataset}/ratings.parquet",
    output:
        interactions="processed/{dataset}/interactions.parquet",
        record="processed/{dataset}/split.stage.json",
    log:
        "logs/{dataset}/split.log",
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: canonical(plan.dataset(wildcards.dataset).split_spec()),
        code=lambda wildcards: plan.code("sources.label"),
        files=named_files,
    shell:
        "exec python -m sources.label --spec {params.spec:q} --code {params.code} {params.files} --log {log:q}"
