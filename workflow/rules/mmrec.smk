# an experiment's data for MMRec
rule mmrec:
    input:
        unpack(lambda wildcards: named(plan.mmrec_inputs(wildcards.experiment))),
    output:
        inter="results/{experiment}/mmrec/{experiment}/{experiment}.inter",
        item_ids="results/{experiment}/mmrec/{experiment}/i_id_mapping.csv",
        user_ids="results/{experiment}/mmrec/{experiment}/u_id_mapping.csv",
        settings="results/{experiment}/mmrec/{experiment}.yaml",
        readme="results/{experiment}/mmrec/README.txt",
        record="results/{experiment}/mmrec/tables.stage.json",
    log:
        "logs/{experiment}/mmrec.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("light"),
        runtime=needs.runtime("light"),
    params:
        identity=identity(lambda wildcards: plan.mmrec(wildcards.experiment)),
        arguments=arguments(lambda wildcards: plan.mmrec(wildcards.experiment)),
    shell:
        "exec python -m cm3.datasets.mmrec.export {params.arguments} --log {log:q}"


# a modality's vectors for MMRec
rule mmrec_vectors:
    input:
        unpack(
            lambda wildcards: named(
                plan.mmrec_vectors_inputs(wildcards.experiment, wildcards.modality)
            )
        ),
    output:
        vectors="results/{experiment}/mmrec/{experiment}/{modality}_feat.npy",
        missing="results/{experiment}/mmrec/{experiment}/{modality}_missing.csv",
        record="results/{experiment}/mmrec/vectors-{modality}.stage.json",
    log:
        "logs/{experiment}/mmrec-vectors-{modality}.log",
    wildcard_constraints:
        modality="[A-Za-z0-9][A-Za-z0-9._-]*",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("control"),
        runtime=needs.runtime("control"),
    params:
        identity=identity(lambda wildcards: plan.mmrec_vectors()),
        arguments=arguments(lambda wildcards: plan.mmrec_vectors()),
    shell:
        "exec python -m cm3.datasets.mmrec.export_vectors {params.arguments} --log {log:q}"
