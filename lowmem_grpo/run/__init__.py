"""The files of a run: its directory, checkpoints, metrics, evaluations and exports."""
