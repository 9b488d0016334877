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
    wildcard_constraints:
        experiment=one_of(plan.named(embeddings=True)),
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("publish"),
        runtime=needs.runtime("publish"),
    params:
        identity=identity(lambda wildcards: plan.publish(wildcards.experiment)),
        arguments=arguments(lambda wildcards: plan.publish(wildcards.experiment)),
    shell:
        "exec python -m workflow.publish {params.arguments} --log {log:q}"


# the same, of models that have weights between items in place of embeddings
use rule publish as publish_item_weights with:
    output:
        metrics="results/{experiment}/metrics.json",
        per_user="results/{experiment}/per_user.parquet",
        recommendations="results/{experiment}/recommendations.parquet",
        model="results/{experiment}/model.safetensors",
    wildcard_constraints:
        experiment=one_of(plan.named(embeddings=False)),
