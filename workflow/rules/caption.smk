# images and item texts to captions
rule caption:
    input:
        # items.parquet and the image manifest
        unpack(files(features.caption_inputs)),
    output:
        captions="processed/{dataset}/captions/{extractor}-{key}.parquet",
        record="processed/{dataset}/captions/{extractor}-{key}.stage.json",
    log:
        "logs/{dataset}/caption-{extractor}-{key}.log",
    # what extraction reads comes before searches of neighbours, as extraction does
    priority: 1
    conda:
        "../../environment.yml"
    threads: share_of_cores(features.caption_gpus)
    resources:
        gpu=gpus(features.caption_gpus),
        gpu_percent=gpu_percent(features.caption_gpus),
        mem_mb=needs.mem_mb("caption"),
        runtime=needs.runtime("caption"),
    params:
        identity=identity(features.caption),
        arguments=arguments(features.caption),
    shell:
        "exec python -m extractors.caption.stage {params.arguments} --log {log:q}"
