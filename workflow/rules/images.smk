# gather and check product pictures
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
    params:
        spec=lambda wildcards: canonical(plan.dataset(wildcards.dataset).images_spec()),
        folder=lambda wildcards: plan.image_folder_digest(wildcards.dataset),
        code=lambda wildcards: plan.source_code(wildcards.dataset, "images"),
        runtime=lambda wildcards, threads: canonical(
            plan.dataset(wildcards.dataset).images_runtime() | {"threads": threads}
        ),
        files=named_files,
    shell:
        "exec python -m sources.images --spec {params.spec:q} --runtime {params.runtime:q} --code {params.code}"
        " {params.files} --log {log:q}"
