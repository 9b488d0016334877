# the selected run to the results of the experiment
rule publish:
    input:
        # the files of the run, and the records of all stages before it
        unpack(files(publish.publish_inputs)),
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
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "embeddings")),
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("publish"),
        runtime=needs.runtime("publish"),
    params:
        identity=identity(publish.publish),
        arguments=arguments(publish.publish),
    shell:
        "exec python -m workflow.publish {params.arguments} --log {log:q}"


# the same for models that have weights between items in place of embeddings
use rule publish as publish_item_weights with:
    output:
        metrics="results/{experiment}/metrics.json",
        per_user="results/{experiment}/per_user.parquet",
        recommendations="results/{experiment}/recommendations.parquet",
        model="results/{experiment}/model.safetensors",
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "item_weights")),


# the same for models that only have lists
use rule publish as publish_lists with:
    output:
        metrics="results/{experiment}/metrics.json",
        per_user="results/{experiment}/per_user.parquet",
        recommendations="results/{experiment}/recommendations.parquet",
        model="results/{experiment}/model.json",
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "lists")),
