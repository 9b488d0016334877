# features, graphs and interactions to a model and its embeddings
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
    wildcard_constraints:
        experiment=one_of(plan.named(embeddings=True)),
    conda:
        "../../environment.yml"
    threads: share_of_cores(lambda wildcards: plan.train_gpus(wildcards.experiment))
    resources:
        gpu=gpus(lambda wildcards: plan.train_gpus(wildcards.experiment)),
        mem_mb=needs.mem_mb("train"),
        runtime=needs.runtime("train"),
    params:
        stage=lambda wildcards, output: plan.trainer(wildcards.experiment),
        identity=identity(
            lambda wildcards: plan.train(wildcards.experiment, wildcards.run)
        ),
        arguments=arguments(
            lambda wildcards: plan.train(wildcards.experiment, wildcards.run)
        ),
    shell:
        "exec python -m {params.stage} {params.arguments} --log {log:q}"


# interactions, and features for some, to weights between items
use rule train as train_item_weights with:
    output:
        model="results/{experiment}/runs/{run}/model.safetensors",
        record="results/{experiment}/runs/{run}/train.stage.json",
    wildcard_constraints:
        experiment=one_of(plan.named(embeddings=False)),
