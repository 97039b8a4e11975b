"""What a run of a given size needs, reckoned from the model's configuration alone.

`sizes` finds the configuration, `counting` counts the memory of a model, `launches` puts the models
of a stage on several GPUs, `work` reckons time. docs/planning.md has the sources.
"""
