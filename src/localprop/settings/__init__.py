"""What a run is: settings as flags, YAML and Python, with their bounds."""
