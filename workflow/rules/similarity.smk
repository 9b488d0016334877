# features without content, in place of the real ones
rule control:
    input:
        features=lambda wildcards: plan.features_path(
            wildcards.dataset, wildcards.extractor, wildcards.key
        ),
    output:
        features="processed/{dataset}/features/{modality}/{extractor}-{key}-{control}.parquet",
        record="processed/{dataset}/features/{modality}/{extractor}-{key}-{control}.stage.json",
    log:
        "logs/{dataset}/control-{modality}-{extractor}-{key}-{control}.log",
    wildcard_constraints:
        control="(gaussian|shuffled)-[0-9]+|constant",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("control"),
        runtime=needs.runtime("control"),
    params:
        identity=identity(
            lambda wildcards: plan.control(wildcards.modality, wildcards.control)
        ),
        arguments=arguments(
            lambda wildcards: plan.control(wildcards.modality, wildcards.control)
        ),
    shell:
        "exec python -m extractors.control {params.arguments} --log {log:q}"


# vectors to each item's nearest items
rule similarity:
    input:
        features=lambda wildcards: plan.features_path(
            wildcards.dataset,
            wildcards.extractor,
            wildcards.key,
            wildcards.control.removeprefix("-"),
        ),
    output:
        similarity="processed/{dataset}/similarity/{extractor}-{key}{control}-k{knn_k}{variant}.parquet",
        record="processed/{dataset}/similarity/{extractor}-{key}{control}-k{knn_k}{variant}.stage.json",
    log:
        "logs/{dataset}/similarity-{extractor}-{key}{control}-k{knn_k}{variant}.log",
    wildcard_constraints:
        control="(-(gaussian|shuffled)-[0-9]+|-constant)?",
        variant="(-hnsw|-ivf)?(-mean)?",
    conda:
        "../../environment.yml"
    threads:
        share_of_cores(
            lambda wildcards: plan.similarity_gpus(
                wildcards.dataset, wildcards.extractor, wildcards.variant
            )
        )
    resources:
        gpu=gpus(
            lambda wildcards: plan.similarity_gpus(
                wildcards.dataset, wildcards.extractor, wildcards.variant
            )
        ),
        mem_mb=needs.mem_mb("similarity"),
        runtime=needs.runtime("similarity"),
    params:
        identity=identity(
            lambda wildcards: plan.similarity(int(wildcards.knn_k), wildcards.variant)
        ),
        arguments=arguments(
            lambda wildcards: plan.similarity(int(wildcards.knn_k), wildcards.variant)
        ),
    shell:
        "exec python -m cm3.similarity.stage {params.arguments} --log {log:q}"
