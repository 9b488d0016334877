# which cells a study has, and where they lie below a root: too much for a command line
rule cells:
    output:
        call="results/{study}/cells.json",
    log:
        "logs/{study}/cells.log",
    localrule: True
    params:
        identity=identity(lambda wildcards: plan.study(wildcards.study)),
    run:
        write_json(output.call, plan.study_call(wildcards.study))


# all cells of a study to means, intervals and tests
rule study:
    input:
        unpack(lambda wildcards: named(plan.study_inputs(wildcards.study))),
        call="results/{study}/cells.json",
    output:
        comparison="results/{study}/comparison.json",
        table="results/{study}/comparison.csv",
        record="results/{study}/compare.stage.json",
    log:
        "logs/{study}/compare.log",
    conda:
        "../../environment.yml"
    threads: 2
    resources:
        mem_mb=needs.mem_mb("compare"),
        runtime=needs.runtime("compare"),
    params:
        identity=identity(lambda wildcards: plan.study(wildcards.study)),
        root=lambda wildcards, input: root_of(
            input, named(plan.study_inputs(wildcards.study))
        ),
    shell:
        "exec python -m cm3.reports.analysis.compare --call {input.call:q} --root {params.root:q}"
        " --output comparison={output.comparison:q} --output table={output.table:q}"
        " --output record={output.record:q} --log {log:q}"
