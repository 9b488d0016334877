"""What the search of a study has found, as its comparison reports it."""

from typing import Any

from cm3.common.errors import UserError
from cm3.common.keys import key_of
from workflow.plan.config import Config
from workflow.plan.runs import run_key


def search_key(config: Config, study: str, experiment: str) -> str:
    """Return the key of all that determines the trials of an experiment of a study with a search, but the budget."""
    chosen = config.studies[study]
    if chosen.search is None:
        raise ValueError(f"{study} has no search")
    base = config.experiments[experiment].with_seed(chosen.seeds[0])
    space = {
        path: values if isinstance(values, list) else values.model_dump()
        for path, values in chosen.search.spaces[experiment].items()
    }
    settings = chosen.search.section.model_dump(mode="json", include={"sampler", "pruner", "seed", "batch"})
    return key_of({"settings": settings, "space": space, "run": run_key(config, base)})


def check_searched(config: Config, study: str) -> None:
    """Raise a UserError unless the search of a study has finished under the configuration; one without a search passes."""
    chosen = config.studies[study]
    if chosen.search is None:
        return
    for name in chosen.search.spaces:
        state = chosen.search.states.get(name)
        if state is None:
            reason = "the search has not started"
        elif state.key != search_key(config, study, name):
            reason = "the settings have changed since the search"
        elif not (state.finished and chosen.search.section.budget_used(state.trials)):
            reason = f"the search has not used up its budget ({len(state.trials)} trials)"
        elif not state.best(1):
            reason = "no trial of the search is complete; widen the space"
        else:
            continue
        raise UserError(f"studies.{study}.search: {name}: {reason}. Run: ./run search {study}")


def search_spec(config: Config, study: str) -> dict[str, Any]:
    """Return what the comparison says about the search of a study, under `search`; empty without one."""
    chosen = config.studies[study]
    if chosen.search is None:
        return {}
    section = chosen.search.section
    settings = section.model_dump(mode="json", exclude={"spaces"})
    states = {name: chosen.search.states[name].model_dump(mode="json") for name in chosen.search.spaces}
    for state in states.values():
        for trial in state["trials"]:
            trial.pop("seconds")  # differs between repetitions of a search
    return {"search": {"settings": settings, "seed_of_trials": chosen.seeds[0], "experiments": states}}
