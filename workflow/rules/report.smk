report: "../report/workflow.rst"


# the results of an experiment to a page
rule experiment_page:
    input:
        unpack(files(pages.experiment_page_inputs)),
    output:
        page=report(
            "results/{experiment}/report.html",
            caption="../report/experiment.rst",
            category="Experiments",
            labels=planned(pages.experiment_labels),
        ),
        figures=report(
            directory("results/{experiment}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            subcategory="{experiment}",
            labels={"of": "{experiment}", "figure": "{figure}"},
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
        identity=identity(pages.experiment_page),
        arguments=arguments(pages.experiment_page),
    shell:
        "exec python -m cm3.reports.pages.experiment_page {params.arguments} --log {log:q}"


# the comparison of a study to a page
rule study_page:
    input:
        comparison="results/{study}/comparison.json",
    output:
        page=report(
            "results/{study}/comparison.html",
            caption="../report/study.rst",
            category="Studies",
            labels=planned(pages.study_labels),
        ),
        figures=report(
            directory("results/{study}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            subcategory="{study}",
            labels={"of": "{study}", "figure": "{figure}"},
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
        identity=identity(pages.study_page),
        arguments=arguments(pages.study_page),
    shell:
        "exec python -m cm3.reports.pages.study_page {params.arguments} --log {log:q}"
