# gather and check product images
rule images:
    input:
        unpack(
            lambda wildcards: named(
                plan.dataset(wildcards.dataset).image_inputs(wildcards.dataset)
            )
        ),
        items_="processed/{dataset}/items.parquet",
    output:
        manifest="processed/{dataset}/images/manifest.parquet",
        record="processed/{dataset}/images/images.stage.json",
    log:
        "logs/{dataset}/images.log",
    conda:
        "../../environment.yml"
    threads: 4
    resources:
        mem_mb=needs.mem_mb("images"),
        runtime=needs.runtime("images"),
    params:
        identity=identity(lambda wildcards: plan.images(wildcards.dataset)),
        arguments=arguments(lambda wildcards: plan.images(wildcards.dataset)),
    shell:
        "exec python -m cm3.datasets.images.stage {params.arguments} --log {log:q}"
