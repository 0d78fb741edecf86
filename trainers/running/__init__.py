"""The processes of one job: its runner, and the workers that Ray Train starts for it."""
