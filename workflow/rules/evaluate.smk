# rank all items and score the test split, once
rule evaluate:
    input:
        unpack(lambda wildcards: named(plan.evaluate_inputs(wildcards.experiment))),
        user_embeddings="results/{experiment}/runs/{run}/user_embeddings.parquet",
        item_embeddings="results/{experiment}/runs/{run}/item_embeddings.parquet",
    output:
        metrics="results/{experiment}/runs/{run}/evaluation.json",
        per_user="results/{experiment}/runs/{run}/per_user.parquet",
        recommendations="results/{experiment}/runs/{run}/recommendations.parquet",
        record="results/{experiment}/runs/{run}/evaluate.stage.json",
    log:
        "logs/{experiment}/evaluate-{run}.log",
    conda:
        "../../environment.yml"
    threads: 8
    params:
        identity=identity(lambda wildcards: plan.evaluate(wildcards.experiment)),
        arguments=arguments(lambda wildcards: plan.evaluate(wildcards.experiment)),
    shell:
        "exec python -m cm3.evaluate {params.arguments} --log {log:q}"
