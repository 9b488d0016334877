# features, graphs and interactions to a model
rule train:
    input:
        unpack(
            lambda wildcards: named(
                plan.train_inputs(wildcards.experiment, wildcards.run)
            )
        ),
    output:
        model="results/{experiment}/runs/{run}/model.safetensors",
        history="results/{experiment}/runs/{run}/history.csv",
        users="results/{experiment}/runs/{run}/user_embeddings.parquet",
        items_="results/{experiment}/runs/{run}/item_embeddings.parquet",
        record="results/{experiment}/runs/{run}/train.stage.json",
    log:
        "logs/{experiment}/train-{run}.log",
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        gpu=1,
    params:
        spec=lambda wildcards: canonical(plan.train_spec(wildcards.experiment)),
        code=lambda wildcards: plan.code("cm3.train"),
        runtime=lambda wildcards, threads: canonical(
            plan.train_runtime(wildcards.experiment, threads)
        ),
        files=named_files,
    shell:
        "exec python -m cm3.train --spec {params.spec:q} --runtime {params.runtime:q} --code {params.code}"
        " {params.files} --log {log:q}"
