# images to sentences
rule caption:
    input:
        unpack(
            lambda wildcards: named(
                plan.caption_inputs(
                    wildcards.dataset, wildcards.extractor, wildcards.key
                )
            )
        ),
    output:
        captions="processed/{dataset}/captions/{extractor}-{key}.parquet",
        record="processed/{dataset}/captions/{extractor}-{key}.stage.json",
    log:
        "logs/{dataset}/caption-{extractor}-{key}.log",
    conda:
        "../../environment.yml"
    threads: share_of_cores(lambda wildcards: plan.caption_gpus(wildcards.extractor))
    resources:
        gpu=gpus(lambda wildcards: plan.caption_gpus(wildcards.extractor)),
        mem_mb=needs.mem_mb("caption"),
        runtime=needs.runtime("caption"),
    params:
        identity=identity(lambda wildcards: plan.caption(wildcards.extractor)),
        arguments=arguments(lambda wildcards: plan.caption(wildcards.extractor)),
    shell:
        "exec python -m extractors.caption.stage {params.arguments} --log {log:q}"
