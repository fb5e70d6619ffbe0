"""Everything a person sees of a training run: progress, results.csv, losses.csv, curves.png, and what came out."""
