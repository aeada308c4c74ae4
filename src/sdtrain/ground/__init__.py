"""What everything else builds on; it imports no params, no models and no other folder of the package."""
