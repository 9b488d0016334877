# vectors to each item's nearest items
rule similarity:
    input:
        features=lambda wildcards: plan.features_path(
            wildcards.dataset, wildcards.extractor, wildcards.key
        ),
    output:
        similarity="processed/{dataset}/similarity/{extractor}-{key}-k{knn_k}.parquet",
        record="processed/{dataset}/similarity/{extractor}-{key}-k{knn_k}.stage.json",
    log:
        "logs/{dataset}/similarity-{extractor}-{key}-k{knn_k}.log",
    conda:
        "../../environment.yml"
    threads: 8
    params:
        identity=identity(lambda wildcards: plan.similarity(int(wildcards.knn_k))),
        arguments=arguments(lambda wildcards: plan.similarity(int(wildcards.knn_k))),
    shell:
        "exec python -m cm3.similarity {params.arguments} --log {log:q}"
