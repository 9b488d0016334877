"""CM3 as a library, without a workflow: fit on ids and arrays, recommend, evaluate, find similar items, save and load."""
