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
    threads: 8
    resources:
        gpu=lambda wildcards: plan.gpus(wildcards.extractor),
    params:
        identity=lambda wildcards: canonical(
            plan.features_identity(wildcards.extractor)
        ),
        code=lambda wildcards: plan.extract_code(wildcards.extractor),
        # functions of more than wildcards are no rerun triggers: the identity above is
        spec=lambda wildcards, threads: canonical(
            plan.extract_spec(wildcards.extractor)
        ),
        runtime=lambda wildcards, threads: canonical(
            plan.extract_runtime(wildcards.extractor, threads)
        ),
        files=named_files,
    shell:
        "exec python -m extractors.extract --spec {params.spec:q} --runtime {params.runtime:q} --code {params.code}"
        " {params.files} --log {log:q}"
