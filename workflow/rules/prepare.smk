# raw files to tables of users, items and ratings after k-core filtering
rule prepare:
    input:
        unpack(files(data.prepare_inputs)),
    output:
        ratings="processed/{dataset}/ratings.parquet",
        items_="processed/{dataset}/items.parquet",
        users="processed/{dataset}/users.parquet",
        stats="processed/{dataset}/stats.json",
        record="processed/{dataset}/prepare.stage.json",
    log:
        "logs/{dataset}/prepare.log",
    conda:
        "../../environment.yml"
    threads: 4
    resources:
        mem_mb=needs.mem_mb("prepare"),
        runtime=needs.runtime("prepare"),
    params:
        identity=identity(data.prepare),
        arguments=arguments(data.prepare),
    shell:
        "exec python -m cm3.datasets.prepare {params.arguments} --log {log:q}"


# ratings to interactions labelled train, valid and test
rule split:
    input:
        # ratings.parquet, and earlier tables where split.keep names some
        unpack(files(data.split_inputs)),
    output:
        interactions="processed/{dataset}/interactions.parquet",
        record="processed/{dataset}/split.stage.json",
    log:
        "logs/{dataset}/split.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("split"),
        runtime=needs.runtime("split"),
    params:
        identity=identity(data.split),
        arguments=arguments(data.split),
    shell:
        "exec python -m cm3.datasets.label {params.arguments} --log {log:q}"


# the same by a further random split, for studies with split.repeats
use rule split as repeat_split with:
    output:
        interactions="processed/{dataset}/splits/{split_seed}/interactions.parquet",
        record="processed/{dataset}/splits/{split_seed}/split.stage.json",
    log:
        "logs/{dataset}/split-{split_seed}.log",
    wildcard_constraints:
        split_seed="[0-9]+",
    params:
        identity=identity(data.repeat_split),
        arguments=arguments(data.repeat_split),


# the texts of reviews of the interactions, for extractors of modality reviews
rule reviews:
    input:
        # the files with reviews, and ratings, users and items
        unpack(files(data.review_inputs)),
    output:
        reviews="processed/{dataset}/reviews.parquet",
        record="processed/{dataset}/reviews.stage.json",
    log:
        "logs/{dataset}/reviews.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("reviews"),
        runtime=needs.runtime("reviews"),
    params:
        identity=identity(data.reviews),
        arguments=arguments(data.reviews),
    shell:
        "exec python -m cm3.datasets.reviews {params.arguments} --log {log:q}"


# the columns of a users' table by which studies compare users; no training reads them
rule user_groups:
    input:
        # the users' table, and the users after k-core filtering
        unpack(files(data.user_groups_inputs)),
    output:
        user_groups="processed/{dataset}/user_groups.parquet",
        record="processed/{dataset}/user_groups.stage.json",
    log:
        "logs/{dataset}/user_groups.log",
    # before trainings, so that a fault of the table is reported first
    priority: 1
    conda:
        "../../environment.yml"
    resources:
        mem_mb=needs.mem_mb("user-groups"),
        runtime=needs.runtime("user-groups"),
    params:
        identity=identity(data.user_groups),
        arguments=arguments(data.user_groups),
    shell:
        "exec python -m cm3.datasets.user_groups {params.arguments} --log {log:q}"
