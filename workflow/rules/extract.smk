# items to the features of one modality
rule extract:
    input:
        # items.parquet, and the image manifest, captions or published vectors that the extractor reads
        unpack(files(features.extract_inputs)),
    output:
        features="processed/{dataset}/features/{modality}/{extractor}-{key}.parquet",
        record="processed/{dataset}/features/{modality}/{extractor}-{key}.stage.json",
    log:
        "logs/{dataset}/extract-{modality}-{extractor}-{key}.log",
    # before small searches of neighbours, which then run at the same time
    priority: 1
    conda:
        "../../environment.yml"
    threads: share_of_cores(features.extract_gpus)
    resources:
        gpu=gpus(features.extract_gpus),
        gpu_percent=gpu_percent(features.extract_gpus),
        mem_mb=needs.mem_mb("extract"),
        runtime=needs.runtime("extract"),
    params:
        identity=identity(features.extract),
        arguments=arguments(features.extract),
    shell:
        "exec python -m extractors.extract {params.arguments} --log {log:q}"
