"""From a request to a plan: all that can be known of a job before anything of it runs."""
