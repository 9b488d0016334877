# settings of a study to the list of its runs and their files, which is too long for a command line
rule study_runs:
    output:
        call="results/{study}/cells.json",
    log:
        "logs/{study}/runs.log",
    localrule: True
    params:
        identity=identity(comparison.study_runs),
    run:
        write_json(output.call, planned(comparison.compare_call)(wildcards))


# runs of a study to means, intervals and tests
rule study:
    input:
        # the tables of the dataset, and of each run its metrics, recommendations and embeddings
        unpack(files(comparison.compare_inputs)),
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
        identity=identity(comparison.compare),
        expected=lambda wildcards, input: canonical_json(
            data.expected_settings(
                settings, planned(comparison.compare_inputs)(wildcards)
            )
        ),
        limits=lambda wildcards, threads, resources: canonical_json(
            {"threads": threads, "mem_mb": resources.get("mem_mb")}
        ),
        root=lambda wildcards, input: root_of(
            input, files(comparison.compare_inputs)(wildcards)
        ),
    shell:
        "exec python -m cm3.reports.analysis.compare --call {input.call:q} --root {params.root:q}"
        " --runtime {params.limits:q} --identity {params.identity:q} --expected {params.expected:q}"
        " --output comparison={output.comparison:q} --output table={output.table:q}"
        " --output record={output.record:q} --log {log:q}"
