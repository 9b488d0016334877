# rank all items and score the test split, once
rule evaluate:
    input:
        unpack(lambda wildcards: named(plan.tables(wildcards.experiment))),
        user_embeddings="results/{experiment}/runs/{run}/user_embeddings.parquet",
        item_embeddings="results/{experiment}/runs/{run}/item_embeddings.parquet",
    output:
        metrics="results/{experiment}/runs/{run}/evaluation.json",
        per_user="results/{experiment}/runs/{run}/per_user.parquet",
        recommendations="results/{experiment}/runs/{run}/recommendations.parquet",
        record="results/{experiment}/runs/{run}/evaluate.stage.json",
    log:
        "logs/{experiment}/evaluate-{run}.log",
    wildcard_constraints:
        experiment=one_of(plan.named(embeddings=True)),
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        mem_mb=needs.mem_mb("evaluate"),
        runtime=needs.runtime("evaluate"),
    params:
        identity=identity(
            lambda wildcards: plan.evaluate(wildcards.experiment, wildcards.run)
        ),
        arguments=arguments(
            lambda wildcards: plan.evaluate(wildcards.experiment, wildcards.run)
        ),
    shell:
        "exec python -m cm3.evaluation.evaluate {params.arguments} --log {log:q}"


# the same, for models that score by weights between items
use rule evaluate as evaluate_item_weights with:
    input:
        unpack(lambda wildcards: named(plan.tables(wildcards.experiment))),
        weights="results/{experiment}/runs/{run}/model.safetensors",
    wildcard_constraints:
        experiment=one_of(plan.named(embeddings=False)),
