"""Turns a request into a plan, and checks all that can be checked before anything of the job runs."""
