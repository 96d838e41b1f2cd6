"""What happens while a plan runs: processes that agree, and what they leave behind."""
