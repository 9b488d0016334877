# wide features to their first principal components
rule reduce:
    input:
        unpack(files(features.reduce_inputs)),
    output:
        features="processed/{dataset}/features/{modality}/{extractor}-{key}-{reduction}.parquet",
        projection="processed/{dataset}/features/{modality}/{extractor}-{key}-{reduction}.safetensors",
        record="processed/{dataset}/features/{modality}/{extractor}-{key}-{reduction}.stage.json",
    log:
        "logs/{dataset}/reduce-{modality}-{extractor}-{key}-{reduction}.log",
    wildcard_constraints:
        reduction="pca[0-9]+",
    conda:
        "../../environment.yml"
    threads: 4
    resources:
        mem_mb=needs.mem_mb("reduce"),
        runtime=needs.runtime("reduce"),
    params:
        identity=identity(features.reduce),
        arguments=arguments(features.reduce),
    shell:
        "exec python -m extractors.reduce {params.arguments} --log {log:q}"


# features to a control: noise, shuffled rows or a constant in their place
rule control:
    input:
        unpack(files(features.control_inputs)),
    output:
        features="processed/{dataset}/features/{modality}/{extractor}-{key}{reduction}-{control}.parquet",
        record="processed/{dataset}/features/{modality}/{extractor}-{key}{reduction}-{control}.stage.json",
    log:
        "logs/{dataset}/control-{modality}-{extractor}-{key}{reduction}-{control}.log",
    wildcard_constraints:
        reduction="(-pca[0-9]+)?",
        control="(gaussian|shuffled)-[0-9]+|constant",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("control"),
        runtime=needs.runtime("control"),
    params:
        identity=identity(features.control),
        arguments=arguments(features.control),
    shell:
        "exec python -m extractors.control {params.arguments} --log {log:q}"


# features to the k nearest neighbours of each item
rule similarity:
    input:
        unpack(files(features.similarity_inputs)),
    output:
        similarity="processed/{dataset}/similarity/{extractor}-{key}{reduction}{control}-k{knn_k}{variant}.parquet",
        record="processed/{dataset}/similarity/{extractor}-{key}{reduction}{control}-k{knn_k}{variant}.stage.json",
    log:
        "logs/{dataset}/similarity-{extractor}-{key}{reduction}{control}-k{knn_k}{variant}.log",
    wildcard_constraints:
        reduction="(-pca[0-9]+)?",
        control="(-(gaussian|shuffled)-[0-9]+|-constant)?",
        variant="(-hnsw|-ivf)?(-mean)?",
    conda:
        "../../environment.yml"
    threads: threads_of_search
    resources:
        gpu=gpus(features.similarity_gpus),
        gpu_percent=gpu_percent(features.similarity_gpus),
        mem_mb=needs.mem_mb("similarity"),
        runtime=needs.runtime("similarity"),
    params:
        identity=identity(features.similarity),
        arguments=arguments(features.similarity),
    shell:
        "exec python -m cm3.similarity.stage {params.arguments} --log {log:q}"
