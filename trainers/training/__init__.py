"""What happens on each rank of a run. `recipe` is the loop; it uses everything else here."""
