# an experiment's tables to the layout of MMRec
rule mmrec:
    input:
        unpack(files(mmrec.export_inputs)),
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
        identity=identity(mmrec.export),
        arguments=arguments(mmrec.export),
    shell:
        "exec python -m cm3.datasets.mmrec.export {params.arguments} --log {log:q}"


# the features of a modality to the layout of MMRec
rule mmrec_vectors:
    input:
        unpack(files(mmrec.vectors_inputs)),
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
        identity=identity(mmrec.vectors),
        arguments=arguments(mmrec.vectors),
    shell:
        "exec python -m cm3.datasets.mmrec.export_vectors {params.arguments} --log {log:q}"
