# copy the run that the config selects
rule publish:
    input:
        unpack(lambda wildcards: named(plan.publish_inputs(wildcards.experiment))),
    output:
        metrics="results/{experiment}/metrics.json",
        per_user="results/{experiment}/per_user.parquet",
        recommendations="results/{experiment}/recommendations.parquet",
        history="results/{experiment}/history.csv",
        model="results/{experiment}/model.safetensors",
        user_embeddings="results/{experiment}/user_embeddings.parquet",
        item_embeddings="results/{experiment}/item_embeddings.parquet",
    log:
        "logs/{experiment}/publish.log",
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: canonical(plan.provenance(wildcards.experiment)),
        code=lambda wildcards: plan.code("workflow.publish"),
        files=named_files,
    shell:
        "exec python -m workflow.publish --spec {params.spec:q} --code {params.code} {params.files} --log {log:q}"
