"""What each way to train takes, known beforehand."""
