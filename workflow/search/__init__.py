"""Search of settings by validation: batches of trials from Optuna, each trial a run of the workflow."""
