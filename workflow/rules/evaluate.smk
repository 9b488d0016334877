# embeddings to ranked items and metrics of the test split
rule evaluate:
    input:
        # interactions, items and users of the experiment's dataset, and what training has left
        unpack(files(runs.evaluate_inputs)),
    output:
        metrics="results/{experiment}/runs/{run}/evaluation.json",
        per_user="results/{experiment}/runs/{run}/per_user.parquet",
        recommendations="results/{experiment}/runs/{run}/recommendations.parquet",
        record="results/{experiment}/runs/{run}/evaluate.stage.json",
    log:
        "logs/{experiment}/evaluate-{run}.log",
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "embeddings")),
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        gpu_percent=gpu_percent_of_evaluation,
        mem_mb=needs.mem_mb("evaluate"),
        runtime=needs.runtime("evaluate"),
    params:
        identity=identity(runs.evaluate),
        arguments=arguments(runs.evaluate),
    shell:
        "exec python -m cm3.evaluation.evaluate {params.arguments} --log {log:q}"


# weights between items to ranked items and metrics of the test split
use rule evaluate as evaluate_item_weights with:
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "item_weights")),


# the lists of a re-ranking to metrics of the test split
use rule evaluate as evaluate_lists with:
    wildcard_constraints:
        experiment=one_of(runs.experiments_that_export(settings, "lists")),
