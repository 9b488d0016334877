# interactions, features and item graphs to a model and its embeddings
rule train:
    input:
        # the tables of the dataset, features and graphs of each modality, and the earlier run of training.warm_start
        unpack(files(runs.train_inputs)),
    output:
        model="results/{experiment}/runs/{run}/model.safetensors",
        history="results/{experiment}/runs/{run}/history.csv",
        users="results/{experiment}/runs/{run}/user_embeddings.parquet",
        items_="results/{experiment}/runs/{run}/item_embeddings.parquet",
        record="results/{experiment}/runs/{run}/train.stage.json",
    log:
        "logs/{experiment}/train-{run}.log",
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "embeddings")),
    conda:
        "../../environment.yml"
    threads: share_of_cores(runs.train_gpus)
    resources:
        gpu=gpus(runs.train_gpus),
        mem_mb=needs.mem_mb("train"),
        runtime=needs.runtime("train"),
    params:
        # takes the output as well, so that a renamed module reruns nothing
        module=lambda wildcards, output: planned(runs.train_module)(wildcards),
        identity=identity(runs.train),
        arguments=arguments(runs.train),
    shell:
        "exec python -m {params.module} {params.arguments} --log {log:q}"


# interactions, and features for some models, to weights between items
use rule train as train_item_weights with:
    output:
        model="results/{experiment}/runs/{run}/model.safetensors",
        record="results/{experiment}/runs/{run}/train.stage.json",
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "item_weights")),


# scores of models to the weights of their re-ranking
use rule train as train_lists with:
    output:
        model="results/{experiment}/runs/{run}/model.json",
        record="results/{experiment}/runs/{run}/train.stage.json",
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "lists")),
