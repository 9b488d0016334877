# item table to stored and checked product images
rule images:
    input:
        unpack(files(data.image_inputs)),
        items_="processed/{dataset}/items.parquet",
    output:
        manifest="processed/{dataset}/images/manifest.parquet",
        record="processed/{dataset}/images/images.stage.json",
    log:
        "logs/{dataset}/images.log",
    # what extraction reads comes before searches of neighbours, as extraction does
    priority: 1
    conda:
        "../../environment.yml"
    threads: 4
    resources:
        mem_mb=needs.mem_mb("images"),
        runtime=needs.runtime("images"),
    params:
        identity=identity(data.images),
        arguments=arguments(data.images),
    shell:
        "exec python -m cm3.datasets.images.stage {params.arguments} --log {log:q}"
