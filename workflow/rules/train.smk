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
        identity=identity(lambda wildcards: plan.train(wildcards.experiment)),
        arguments=arguments(lambda wildcards: plan.train(wildcards.experiment)),
    shell:
        "exec python -m cm3.train {params.arguments} --log {log:q}"
