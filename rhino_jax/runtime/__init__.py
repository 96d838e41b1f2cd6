"""What happens while a plan runs: the tasks of pipelines, processes that agree."""
