# vectors to each item's nearest items
rule similarity:
    input:
        features=lambda wildcards: plan.features(
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
        spec=lambda wildcards: canonical({"knn_k": int(wildcards.knn_k)}),
        code=lambda wildcards: plan.code("cm3.similarity"),
        runtime=lambda wildcards, threads: canonical({"threads": threads}),
        files=named_files,
    shell:
        "exec python -m cm3.similarity --spec {params.spec:q} --runtime {params.runtime:q} --code {params.code}"
        " {params.files} --log {log:q}"
