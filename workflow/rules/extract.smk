# items to one modality's vectors
rule extract:
    input:
        unpack(
            lambda wildcards: named(
                plan.extract_inputs(
                    wildcards.dataset, wildcards.extractor, wildcards.key
                )
            )
        ),
    output:
        features="processed/{dataset}/features/{modality}/{extractor}-{key}.parquet",
        record="processed/{dataset}/features/{modality}/{extractor}-{key}.stage.json",
    log:
        "logs/{dataset}/extract-{modality}-{extractor}-{key}.log",
    conda:
        "../../environment.yml"
    threads: share_of_cores(lambda wildcards: plan.extract_gpus(wildcards.extractor))
    resources:
        gpu=gpus(lambda wildcards: plan.extract_gpus(wildcards.extractor)),
        mem_mb=needs.mem_mb("extract"),
        runtime=needs.runtime("extract"),
    params:
        identity=identity(lambda wildcards: plan.extract(wildcards.extractor)),
        arguments=arguments(lambda wildcards: plan.extract(wildcards.extractor)),
    shell:
        "exec python -m extractors.extract {params.arguments} --log {log:q}"
