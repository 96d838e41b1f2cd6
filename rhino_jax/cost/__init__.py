"""What things cost: the cheapest collectives, and their bytes. Plain Python."""
