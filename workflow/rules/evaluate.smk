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
        spec=lambda wildcards: canonical(plan.evaluate_spec(wildcards.experiment)),
        code=lambda wildcards: plan.code("cm3.evaluate"),
        runtime=lambda wildcards, threads: canonical({"threads": threads}),
        files=named_files,
    shell:
        "exec python -m cm3.evaluate --spec {params.spec:q} --runtime {params.runtime:q} --code {params.code}"
        " {params.files} --log {log:q}"
