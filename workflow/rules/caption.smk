# pictures to sentences
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
    threads: 8
    resources:
        gpu=lambda wildcards: plan.gpus(wildcards.extractor),
    params:
        identity=lambda wildcards: canonical(plan.identity(wildcards.extractor)),
        code=lambda wildcards: plan.caption_code(wildcards.extractor),
        # functions of more than wildcards are no rerun triggers: the identity above is
        spec=lambda wildcards, threads: canonical(
            plan.caption_spec(wildcards.extractor)
        ),
        runtime=lambda wildcards, threads: canonical(
            plan.caption_runtime(wildcards.extractor, threads)
        ),
        files=named_files,
    shell:
        "exec python -m extractors.caption --spec {params.spec:q} --runtime {params.runtime:q} --code {params.code}"
        " {params.files} --log {log:q}"
