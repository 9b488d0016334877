report: "../report/workflow.rst"


# an experiment as a page
rule experiment_page:
    input:
        unpack(lambda wildcards: named(plan.report_inputs(wildcards.experiment))),
    output:
        page=report(
            "results/{experiment}/report.html",
            caption="../report/experiment.rst",
            category="Experiments",
            labels={"experiment": "{experiment}", "what": "page"},
        ),
        figures=report(
            directory("results/{experiment}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            subcategory="{experiment}",
            labels={"figure": "{figure}"},
        ),
        record="results/{experiment}/report.stage.json",
    log:
        "logs/{experiment}/report.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("light"),
        runtime=needs.runtime("light"),
    params:
        identity=identity(
            lambda wildcards: plan.page("experiment-page")
        ),
        arguments=arguments(
            lambda wildcards: plan.page("experiment-page")
        ),
    shell:
        "exec python -m cm3.reports.pages.experiment_page {params.arguments} --log {log:q}"


# a study's comparison as a page
rule study_page:
    input:
        comparison="results/{study}/comparison.json",
    output:
        page=report(
            "results/{study}/comparison.html",
            caption="../report/study.rst",
            category="Studies",
            labels={"study": "{study}", "what": "page"},
        ),
        figures=report(
            directory("results/{study}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            subcategory="{study}",
            labels={"figure": "{figure}"},
        ),
        record="results/{study}/page.stage.json",
    log:
        "logs/{study}/page.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("light"),
        runtime=needs.runtime("light"),
    params:
        identity=identity(lambda wildcards: plan.page("study-page")),
        arguments=arguments(lambda wildcards: plan.page("study-page")),
    shell:
        "exec python -m cm3.reports.pages.study_page {params.arguments} --log {log:q}"
