# vectors to each item's nearest items
rule similarity:
    input:
        features=lambda wildcards: plan.features_path(
            wildcards.dataset, wildcards.extractor, wildcards.key
        ),
    output:
        similarity="processed/{dataset}/similarity/{extractor}-{key}-k{knn_k}{variant}.parquet",
        record="processed/{dataset}/similarity/{extractor}-{key}-k{knn_k}{variant}.stage.json",
    log:
        "logs/{dataset}/similarity-{extractor}-{key}-k{knn_k}{variant}.log",
    wildcard_constraints:
        variant="(-hnsw|-ivf)?(-mean)?",
    conda:
        "../../environment.yml"
    threads: 8
    params:
        identity=identity(
            lambda wildcards: plan.similarity(int(wildcards.knn_k), wildcards.variant)
        ),
        arguments=arguments(
            lambda wildcards: plan.similarity(int(wildcards.knn_k), wildcards.variant)
        ),
    shell:
        "exec python -m cm3.similarity {params.arguments} --log {log:q}"
