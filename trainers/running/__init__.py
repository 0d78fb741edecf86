"""The processes of one job: its runner, and the workers that the runner starts with Ray Train."""
