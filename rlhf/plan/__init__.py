"""What a run of a given size needs, reckoned from the model's configuration alone.

`sizes` finds the configuration, `roles` counts the memory of each model of a stage, `launches` puts
them on several GPUs, `work` reckons time. `docs/planning.md` has the formulas with their sources.
"""
