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
    resources:
        mem_mb=needs.mem_mb("prepare"),
        runtime=needs.runtime("prepare"),
    params:
        identity=identity(lambda wildcards: plan.prepare(wildcards.dataset)),
        arguments=arguments(lambda wildcards: plan.prepare(wildcards.dataset)),
    shell:
        "exec python -m cm3.datasets.prepare {params.arguments} --log {log:q}"


# label interactions train, valid, test
rule split:
    input:
        unpack(lambda wildcards: named(plan.split_inputs(wildcards.dataset))),
    output:
        interactions="processed/{dataset}/interactions.parquet",
        record="processed/{dataset}/split.stage.json",
    log:
        "logs/{dataset}/split.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("split"),
        runtime=needs.runtime("split"),
    params:
        identity=identity(lambda wildcards: plan.split(wildcards.dataset)),
        arguments=arguments(lambda wildcards: plan.split(wildcards.dataset)),
    shell:
        "exec python -m cm3.datasets.label {params.arguments} --log {log:q}"
